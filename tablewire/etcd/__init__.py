"""etcd: sessions, watches and leases, and the keys and records that a cluster stores. How is shared state kept?"""
