"""The gRPC front door: what clients see."""
