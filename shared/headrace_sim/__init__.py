"""The simulator: the fleet as discrete events, around the very policies that the services run."""
