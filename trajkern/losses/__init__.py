"""The policy losses: their kinds, what a configuration says, and which tokens the covariance kinds choose."""
