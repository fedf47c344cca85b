"""step_oracle.v1 on the wire: the only part of the server that knows the protocol."""
