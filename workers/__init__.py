"""The data plane: model, dispatch, gateways and expert workers. It never imports the control plane."""
