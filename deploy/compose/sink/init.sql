-- Initializes the sink at its first start: the role that writes, which creates schemas and tables. psql runs this in `shop`.
\set ON_ERROR_STOP on
\getenv password TABLEWIRE_PASSWORD

CREATE ROLE tablewire LOGIN PASSWORD :'password';
GRANT CONNECT, CREATE ON DATABASE shop TO tablewire;
-- Triggers and foreign keys already had their effect at the source and must not fire at the sink.
GRANT SET ON PARAMETER session_replication_role TO tablewire;
