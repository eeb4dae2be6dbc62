"""The Qwen3.5-MoE text model: configuration, weights, layers and sampling."""
