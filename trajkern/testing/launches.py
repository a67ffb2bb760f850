"""How many kernels a call launches on a GPU: the bounds that the tests hold, on meta tensors and without a GPU."""

# op -> kernels that any case of the registry launches at most, forward and backward
LAUNCHES = {
    "token_logprobs": (1, 1),
    "token_stats": (1, 1),
    "group_advantages": (2, 2),
    "discounted_returns": (1, 1),
    "gae": (3, 4),
    "whiten": (2, 2),
    "variance_weights": (8, 2),
    "reflection_rewards": (11, 4),
    "span_reduce": (1, 4),
    "spread": (1, 1),
    "subtree_reduce": (3, 4),
    "sibling_advantages": (1, 2),
    "branch_coefficients": (3, 1),
    "policy_loss": (3, 1),  # of the forward's one fills a normalizer that is a number
}
BESIDE = ("branch",)  # arguments whose sums are calls of their own, not counted
HEAD_LAUNCHES = {"linear_logprobs": 8, "linear_policy_loss": 8}  # of a block of rows, for each three products
FAMILIES = {"advantage": 4, "span": 4, "tree": 4}  # family -> what none of its launches may exceed
