"""A device that takes as long as a law says, for engines of the closed loop; copied beside the shim they run with."""
