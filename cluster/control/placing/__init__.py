"""Which replicas should lie where, by what is asked of them: pure, numpy."""
