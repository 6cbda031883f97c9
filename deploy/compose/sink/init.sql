-- The sink at its first start: the role that writes. It creates schemas and tables itself. psql runs this in `shop`.
\set ON_ERROR_STOP on
\getenv password TABLEWIRE_PASSWORD

CREATE ROLE tablewire LOGIN PASSWORD :'password';
GRANT CONNECT, CREATE ON DATABASE shop TO tablewire;
-- So that triggers and foreign keys of the sink do not fire for what was done at the source already.
GRANT SET ON PARAMETER session_replication_role TO tablewire;
