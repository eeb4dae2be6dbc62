"""Decisions about members, placement and scale, and the controller that carries them out."""
