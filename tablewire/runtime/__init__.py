"""What every service needs: configuration, logs, metrics, HTTP, gRPC, TLS, threads, queues."""
