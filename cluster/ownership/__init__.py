"""Who owns a request: claims at its directory, and what a gateway keeps for those who return."""
