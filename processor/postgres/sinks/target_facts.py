"""What a table at a PostgreSQL sink has besides its columns: triggers, rules, indexes, operators. Decides how it may be written.

The query runs inside the transaction that plans the table; everything else is pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from processor.postgres.sinks.connection import SinkConnection
from tablewire.postgres.connections import quoted

EQUALS = "OPERATOR(pg_catalog.=)"


@dataclass(frozen=True, slots=True)
class TargetIndex:
    """An index on columns only and on all rows. is_unique: each statement checks it; is_search: a B-tree or hash index."""

    columns: tuple[str, ...]
    is_unique: bool
    is_search: bool


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """See the module.

    hides_rows: row-level security applies to our role. has_triggers: some that fire in our session;
    enforces_keys: so do those of foreign keys; may_defer: and some constraint is deferrable.
    has_rules: of any kind; firing_rules: those that replace a statement of our session. sequences:
    quoted, owned by its columns. names: of all columns that can be written; always: those that are
    GENERATED ALWAYS AS IDENTITY. equals: the equality operator of a column, if it is not EQUALS.
    """

    is_partitioned: bool = False
    hides_rows: bool = False
    has_triggers: bool = False
    enforces_keys: bool = False
    may_defer: bool = False
    has_rules: bool = False
    firing_rules: tuple[str, ...] = ()
    is_referenced: bool = False
    sequences: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    always: frozenset[str] = frozenset()
    equals: tuple[tuple[str, str], ...] = ()
    indexes: tuple[TargetIndex, ...] = ()

    def equals_of(self, name: str) -> str:
        return next((operator for column, operator in self.equals if column == name), EQUALS)

    def is_unique(self, key: Sequence[str]) -> bool:
        """Return whether no statement may leave two rows with the same values in these columns."""
        return any(index.is_unique and set(index.columns) == set(key) for index in self.indexes)

    def search_columns(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the leading columns of the best index that finds a row by (some of) these columns; empty if there is none."""
        best: tuple[str, ...] = ()
        for index in sorted(self.indexes, key=lambda index: not index.is_unique):
            found = []
            for column in index.columns:
                if column not in names:
                    break
                found.append(column)
            if index.is_search and len(found) > len(best):
                best = tuple(found)
                if index.is_unique and len(found) == len(index.columns):
                    break
        return best

    def why_exact(self, names: Sequence[str], key: Sequence[str]) -> str:
        """Return why each change needs a statement of its own, in the source's order; empty if changes may be combined.

        names, key: of the source's columns.
        """
        if self.has_triggers:
            return "triggers"
        if self.has_rules:
            return "rules"
        if set(self.names) - set(names):
            return "local columns"
        if not key:
            return "no key"
        if self.always.intersection(names) - set(key):
            return "identity columns"
        return "" if self.is_unique(key) else "no unique index"


# A trigger fires for a session by its session_replication_role; partitions have triggers of their own.
_FIRES = "CASE WHEN current_setting('session_replication_role') = 'replica' THEN '{A,R}'::text[] ELSE '{O,A}'::text[] END"
# The equality operator of an index of the column, or else of the type's default operator class.
_EQUALS = """
SELECT format('OPERATOR(%%I.%%s)', n.nspname, o.oprname)
  FROM (SELECT i.indisunique, i.indisprimary, k.opclass
          FROM pg_catalog.pg_index i CROSS JOIN LATERAL unnest(i.indkey::int2[], i.indclass::oid[]) AS k (attnum, opclass)
         WHERE i.indrelid = a.attrelid AND i.indisvalid AND k.attnum = a.attnum
         UNION ALL
        SELECT NULL, NULL, oc.oid FROM pg_catalog.pg_opclass oc WHERE oc.opcdefault AND oc.opcintype = base.oid) found
  JOIN pg_catalog.pg_opclass oc ON oc.oid = found.opclass JOIN pg_catalog.pg_am m ON m.oid = oc.opcmethod
  JOIN pg_catalog.pg_amop ao ON ao.amopfamily = oc.opcfamily AND ao.amoplefttype = oc.opcintype
   AND ao.amoprighttype = oc.opcintype AND ao.amopstrategy = CASE m.amname WHEN 'btree' THEN 3 WHEN 'hash' THEN 1 END
  JOIN pg_catalog.pg_operator o ON o.oid = ao.amopopr JOIN pg_catalog.pg_namespace n ON n.oid = o.oprnamespace
 ORDER BY found.indisunique DESC NULLS LAST, found.indisprimary DESC NULLS LAST, m.amname LIMIT 1"""
_QUERY = f"""
SELECT jsonb_build_object(
  'is_partitioned', c.relkind = 'p',
  'hides_rows', row_security_active(c.oid),
  'has_triggers', EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgenabled::text = ANY ({_FIRES}) AND NOT t.tgisinternal
     AND (t.tgrelid = c.oid OR t.tgrelid IN (SELECT relid FROM pg_catalog.pg_partition_tree(c.oid)))),
  'enforces_keys', EXISTS (SELECT FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_constraint f ON f.oid = t.tgconstraint
     WHERE t.tgenabled::text = ANY ({_FIRES}) AND f.contype = 'f' AND t.tgrelid = c.oid),
  'may_defer', EXISTS (SELECT FROM pg_catalog.pg_trigger t
     WHERE t.tgenabled::text = ANY ({_FIRES}) AND t.tgdeferrable AND t.tgisinternal AND t.tgrelid = c.oid),
  'has_rules', c.relhasrules AND EXISTS (SELECT FROM pg_catalog.pg_rewrite r WHERE r.ev_class = c.oid),
  'firing_rules', ARRAY(SELECT r.rulename FROM pg_catalog.pg_rewrite r
     WHERE r.ev_class = c.oid AND r.is_instead AND r.ev_enabled::text = ANY ({_FIRES})),
  'is_referenced', EXISTS (SELECT FROM pg_catalog.pg_constraint f WHERE f.confrelid = c.oid AND f.conrelid <> c.oid),
  'sequences', ARRAY(SELECT format('%%I.%%I', n.nspname, s.relname)
     FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_class s ON s.oid = d.objid AND s.relkind = 'S'
     JOIN pg_catalog.pg_namespace n ON n.oid = s.relnamespace
    WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.refclassid = 'pg_catalog.pg_class'::regclass
      AND d.refobjid = c.oid AND d.deptype IN ('a', 'i')),
  'columns', (SELECT jsonb_agg(jsonb_build_object('name', a.attname, 'is_always', a.attidentity = 'a', 'equals', ({_EQUALS})))
     FROM pg_catalog.pg_attribute a
     JOIN LATERAL (WITH RECURSIVE b (oid, base) AS (SELECT t.oid, t.typbasetype FROM pg_catalog.pg_type t WHERE t.oid = a.atttypid
            UNION ALL SELECT t.oid, t.typbasetype FROM b JOIN pg_catalog.pg_type t ON t.oid = b.base)
          SELECT b.oid FROM b WHERE b.base = 0) base ON true
    WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''),
  'indexes', (SELECT jsonb_agg(jsonb_build_object('is_search', m.amname IN ('btree', 'hash'),
       'is_unique', i.indisunique AND i.indimmediate AND NOT i.indisexclusion,
       'columns', ARRAY(SELECT a.attname FROM unnest((i.indkey::int2[])[0:i.indnkeyatts - 1]) WITH ORDINALITY AS k (attnum, n)
          JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum ORDER BY k.n)) ORDER BY i.indexrelid)
     FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class x ON x.oid = i.indexrelid JOIN pg_catalog.pg_am m ON m.oid = x.relam
    WHERE i.indrelid = c.oid AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL))
  FROM pg_catalog.pg_class c WHERE c.oid = %s::oid"""


def read_facts(connection: SinkConnection, table_id: int) -> TargetFacts:
    """Return the facts of the table with this id at the sink, which the transaction has locked."""
    found: dict[str, Any] = connection.query(_QUERY, (table_id,))[0][0]
    columns = found["columns"] or ()
    return TargetFacts(
        found["is_partitioned"],
        found["hides_rows"],
        found["has_triggers"],
        found["enforces_keys"],
        found["may_defer"],
        found["has_rules"],
        tuple(found["firing_rules"]),
        found["is_referenced"],
        tuple(found["sequences"]),
        tuple(column["name"] for column in columns),
        frozenset(column["name"] for column in columns if column["is_always"]),
        tuple((column["name"], column["equals"]) for column in columns if column["equals"] not in (None, EQUALS)),
        tuple(TargetIndex(tuple(index["columns"]), index["is_unique"], index["is_search"]) for index in found["indexes"] or ()),
    )


def truncates(table: str, facts: TargetFacts, restarts: bool) -> tuple[str, ...]:
    """Return the statements that empty the table, and only it; restarts: its sequences restart.

    TRUNCATE is refused for a table that foreign keys of others refer to, even if those are empty or are
    truncated at the source by the same statement: each table follows at its own position.
    """
    only = table if facts.is_partitioned else f"ONLY {table}"
    if not facts.is_referenced:
        return (f"TRUNCATE {only}" + (" RESTART IDENTITY" if restarts else ""),)
    sequences = [f"ALTER SEQUENCE {sequence} RESTART" for sequence in facts.sequences] if restarts else []
    return (f"DELETE FROM {only}", *sequences)


def why_unwritable(table: str, facts: TargetFacts) -> str:
    """Return why the table cannot be written exactly, with a way out; empty if it can."""
    if facts.hides_rows:
        return (
            f"table {table}: row-level security at the sink applies to the role of the sink URI, so rows may be hidden from it:"
            f" let the role own the table without FORCE ROW LEVEL SECURITY, give it BYPASSRLS, or ALTER TABLE {table}"
            " DISABLE ROW LEVEL SECURITY at the sink"
        )
    if facts.firing_rules:
        rules = ", ".join(facts.firing_rules)
        disable = "; ".join(f"ALTER TABLE {table} DISABLE RULE {quoted(rule)}" for rule in facts.firing_rules)
        return f"table {table}: rules at the sink replace what is written to it ({rules}): {disable}"
    return ""
