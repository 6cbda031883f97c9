"""What operators can ask of the owner, and the gRPC service that they ask."""
