"""What holds for all tests."""

from hypothesis import settings

# A deadline for an example tells how busy the machine is; each test has a limit of its own.
settings.register_profile("default", deadline=None)
settings.load_profile("default")
