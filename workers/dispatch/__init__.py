"""Moving token rows to the workers that hold their experts, and the partial sums back."""
