"""What the cluster refuses."""


class ClusterError(Exception):
    """A cluster that cannot be reached, or a device that is not there: one sentence with the remedy."""
