"""How many members of each role there should be, by what they say of their load: pure."""
