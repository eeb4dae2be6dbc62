"""The data plane: model, dispatch, gateways, expert workers. It imports no control plane."""
