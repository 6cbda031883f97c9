"""What operators can ask of an owner: the operations, dry runs, and the gRPC service for them."""
