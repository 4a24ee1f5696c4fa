"""The reward of one group, all at once."""
import reward


def score(scorer, question, solution, responses):
    """What reward.finish() returns for the one job of these responses."""
    return reward.finish(scorer, [reward.start(scorer, question, solution, responses)])[0]
