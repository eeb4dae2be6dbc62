"""The gateway: sequences, their memory, the schedule of each step and the step itself."""
