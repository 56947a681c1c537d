"""How the outside reaches the broker: gRPC, HTTP and Unix socket."""
