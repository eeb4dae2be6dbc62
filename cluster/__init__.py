"""The control plane and the front door. It imports the data plane, never the reverse."""
