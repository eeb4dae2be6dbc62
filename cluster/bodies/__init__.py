"""What runs inside each process: plain classes that the runtime hosts and the controller calls.

Their methods are the phases of `cluster.control.lifecycle`, and `adopt`, `pulse`, `hold`. A body
translates between the control plane's calls and the component that does the work, and serves the
process's metrics; it decides nothing.
"""
