"""The `expertmesh` command."""
