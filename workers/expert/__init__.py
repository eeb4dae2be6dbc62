"""The expert worker: slots of expert weights, and the loop that answers calls."""
