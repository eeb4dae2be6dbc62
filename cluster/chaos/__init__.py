"""Chaos: a load, faults in the members that serve it, and whether any client could tell."""
