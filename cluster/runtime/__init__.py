"""Ray: the only package that imports it.

Ray starts, watches and ends processes and carries slow control messages. It never carries a tensor
or a token.
"""
