"""Everything that touches etcd: sessions, watches, leases, keys and records."""
