"""The functions, and the losses across processes, broken."""

from .mutant import Mutant

_FN = "ffcl_fast/functional/"

MUTANTS = (
    Mutant(
        "python",
        "the positive pulls the wrong way",
        _FN + "contrast.py",
        "weight = share * -scale",
        "weight = share * scale",
        "tests/test_functional.py -k 'gradcheck and info_nce and panels'",
    ),
    Mutant(
        "python",
        "self-similarity's gradient of the scale counts twice",
        _FN + "similarity.py",
        "return total / 2 if k is None else total",
        "return total",
        "tests/test_functional.py -k 'gradcheck_losses and nt_xent and panels'",
    ),
    Mutant(
        "python",
        "a row of zeros is projected",
        _FN + "similarity.py",
        "inner = (z.to(norm.dtype) * dz).sum(-1, keepdim=True).mul_(norm > ctx.eps)",
        "inner = (z.to(norm.dtype) * dz).sum(-1, keepdim=True)",
        "tests/test_hard_numbers.py -k 'short'",
    ),
    Mutant(
        "python",
        "an anchor is its own positive",
        _FN + "contrastive.py",
        "rest, count = sums - own[:, 0], members * views - 1",
        "rest, count = sums, members * views",
        "tests/test_properties.py -k sup_con",
    ),
    Mutant(
        "python",
        "integers of class sums have no room for the sum",
        _FN + "class_sums.py",
        "bits = 62 - _bit_length(x.shape[0], x.device) - ",
        "bits = 62 - ",
        "tests/test_class_sums.py",
    ),
    Mutant(
        "python",
        "a class with an infinite element has a plausible sum",
        _FN + "class_sums.py",
        "+ lost[:, None]",
        "",
        "tests/test_class_sums.py",
    ),
    Mutant(
        "python",
        "the weight of a pair is not shared among the rows",
        _FN + "pair_cosine.py",
        'scale = float(weight) / rows if reduction == "mean" else float(weight)',
        "scale = float(weight)",
        "tests/test_properties_goodness.py -k test_pair_cosine",
    ),
    Mutant(
        "python",
        "a second backward pass lacks the upstream gradient",
        _FN + "pair_cosine.py",
        "grad = (grad * scale).to(coefficients.dtype)",
        "grad = (grad * 0 + scale).to(coefficients.dtype)",
        "tests/test_pair_cosine.py -k every_use",
    ),
    Mutant(
        "python",
        "the processes opposite in a ring share a row",
        "ffcl_fast/distributed/similarity.py",
        "return whole[0], slice(rows[owner] // 2, rows[owner])",
        "return whole[0], slice(max(0, rows[owner] // 2 - 1), rows[owner])",
        "tests/test_across.py -k 'test_contract and 4'",
    ),
    Mutant(
        "python",
        "other processes' rows pass for positives",
        "ffcl_fast/distributed/pairwise.py",
        "pairs(everyone[cols], cols == mine)",
        "pairs(everyone[cols], True)",
        "tests/test_across.py -k 'test_contract and 2'",
    ),
    Mutant(
        "python",
        "the scale's gradient is a sum over processes",
        "ffcl_fast/distributed/pairwise.py",
        "return total / torch.distributed.get_world_size(ctx.group), None",
        "return total, None",
        "tests/test_across.py -k 'test_contract and 2'",
    ),
)
