"""The demo model: a small Qwen3.5-MoE checkpoint that ships with the package; see README.md."""
