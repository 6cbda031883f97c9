"""Process plumbing of both services: configuration, logs, metrics, mailbox, shutdown, the etcd session, TLS."""
