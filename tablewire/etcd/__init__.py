"""How shared state is kept: sessions, watches and leases of etcd, and a cluster's keys and records."""
