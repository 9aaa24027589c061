"""Bad input: the error's type and exact words, and that nothing was computed or changed by then."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fused_arcface as fa
from fused_arcface.engine import ops

FUNCTIONS = {"reference": fa.reference.margin_softmax_loss, "fused": fa.margin_softmax_loss}
X, W, Y = torch.ones(4, 8), torch.ones(5, 8), torch.tensor([0, 1, 2, 4])
FLOATS = "one of the dtypes float32, float64, bfloat16, float16"
INTEGERS = "one of the dtypes int64, int32, int16, int8, uint64, uint32, uint16, uint8"
INSTEAD = (
    "for one-hot labels pass target.argmax(1); for two labels a row pass target=(first, second, share); for soft or "
    "multi-hot labels take torch.nn.functional.cross_entropy over head.logits(embeddings)"
)

BAD = {
    "list": ({"embeddings": [[1.0]]}, TypeError, "embeddings must be a torch.Tensor; got list"),
    "integer": ({"embeddings": X.long()}, TypeError, f"embeddings must have {FLOATS}; got int64"),
    "fp8": ({"weight": W.to(torch.float8_e4m3fn)}, TypeError, f"weight must have {FLOATS}; got float8_e4m3fn"),
    "float labels": ({"target": Y.float()}, TypeError, f"target must have {INTEGERS}; got float32: pass target.long()"),
    "bool labels": ({"target": Y > 0}, TypeError, f"target must have {INTEGERS}; got bool"),
    "labels None": ({"target": None}, TypeError, "target must be a torch.Tensor; got NoneType"),
    "sparse": ({"weight": W.to_sparse()}, ValueError, "weight must be a dense tensor; got layout torch.sparse_coo"),
    "one row": ({"embeddings": X[0]}, ValueError, "embeddings must be (N, D) with D >= 1; got (8,)"),
    "rows of one": (
        {"embeddings": X[:, None]},
        ValueError,
        "embeddings must be (N, D) with D >= 1; got (4, 1, 8): pass embeddings.flatten(0, -2), and a label for each of "
        "its rows",
    ),
    "convolution": (
        {"embeddings": X[..., None, None]},
        ValueError,
        "embeddings must be (N, D) with D >= 1; got (4, 8, 1, 1): pass embeddings.flatten(1)",
    ),
    "feature map": (
        {"embeddings": X[..., None].expand(4, 8, 3)},
        ValueError,
        "embeddings must be (N, D) with D >= 1; got (4, 8, 3)",
    ),
    "D = 0": ({"embeddings": X[:, :0]}, ValueError, "embeddings must be (N, D) with D >= 1; got (4, 0)"),
    "other D": ({"weight": W[:, :7]}, ValueError, "weight must be (C, D=8); got (5, 7)"),
    "weight (D,)": ({"weight": W[0]}, ValueError, "weight must be (C, D=8); got (8,)"),
    "C = 0": ({"weight": W[:0]}, ValueError, "weight must hold at least one class; got (0, 8)"),
    "other N": ({"target": Y[:3]}, ValueError, "target must be (N=4,); got (3,)"),
    "column of labels": (
        {"target": Y[:, None]},
        ValueError,
        "target must be (N=4,); got (4, 1): pass target.flatten()",
    ),
    "column of floats": (
        {"target": Y[:, None].float()},
        TypeError,
        f"target must have {INTEGERS}; got float32: pass target.flatten().long()",
    ),
    "one-hot floats": (
        {"target": torch.zeros(4, 5)},
        TypeError,
        f"target must have {INTEGERS}; got float32: {INSTEAD}",
    ),
    "one-hot": ({"target": torch.zeros(4, 5).long()}, ValueError, f"target must be (N=4,); got (4, 5): {INSTEAD}"),
    "scalar label": ({"target": torch.tensor(1)}, ValueError, "target must be (N=4,); got ()"),
    "weight elsewhere": (
        {"weight": W.to("meta")},
        ValueError,
        "weight must be on embeddings' device cpu; got meta",
    ),
    "labels elsewhere": ({"target": Y.to("meta")}, ValueError, "target must be on embeddings' device cpu; got meta"),
    "scale text": ({"scale": "64"}, TypeError, "scale must be a number, a 0-dim parameter or AdaCos(); got str"),
    "scale of NumPy": (
        {"scale": np.float32(64)},
        TypeError,
        "scale must be a number, a 0-dim parameter or AdaCos(); got float32: pass it as float(...)",
    ),
    "smoothing class": ({"label_smoothing": float}, TypeError, "label_smoothing must be a number; got type"),
    "smoothing of each row": (
        {"label_smoothing": torch.zeros(4)},
        TypeError,
        "label_smoothing must be a number; got Tensor",
    ),
    "scale bool": ({"scale": True}, TypeError, "scale must be a number; got bool"),
    "scale 0": ({"scale": 0}, ValueError, "scale must be finite and > 0; got 0"),
    "scale < 0": ({"scale": -1.5}, ValueError, "scale must be finite and > 0; got -1.5"),
    "scale inf": ({"scale": math.inf}, ValueError, "scale must be finite and > 0; got inf"),
    "scale NaN": ({"scale": math.nan}, ValueError, "scale must be finite and > 0; got nan"),
    "margin number": (
        {"margin": 0.5},
        TypeError,
        "margin must be a margin of fused_arcface or a callable; got float",
    ),
    "margin class": (
        {"margin": fa.ArcFace},
        TypeError,
        "margin must be an instance, not the class ArcFace: write ArcFace(); got the class",
    ),
    "reduction": (
        {"reduction": "avg"},
        ValueError,
        "reduction must be one of 'mean', 'sum', 'none'; got 'avg'",
    ),
    "ignore_index": ({"ignore_index": -1.0}, TypeError, "ignore_index must be an int; got float"),
    "ignore_index bool": ({"ignore_index": False}, TypeError, "ignore_index must be an int; got bool"),
    "ignore_index range": (
        {"ignore_index": 1 << 63},
        ValueError,
        "ignore_index must be in [-2^63, 2^63); got 9223372036854775808",
    ),
    "label too large": (
        {"target": torch.tensor([0, 1, 5, 9])},
        ValueError,
        "target must be in [0, C=5) or ignore_index=-100; got 5 at row 2",
    ),
    "label negative": (
        {"target": torch.tensor([0, 1, 2, -1], dtype=torch.int8), "ignore_index": 3},
        ValueError,
        "target must be in [0, C=5) or ignore_index=3; got -1 at row 3",
    ),
    "label 255": (
        {"target": torch.tensor([0, 255, 2, 0], dtype=torch.uint8)},
        ValueError,
        "target must be in [0, C=5) or ignore_index=-100; got 255 at row 1",
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("name", BAD)
def test_bad_input(function: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, error, message = BAD[name]
    monkeypatch.setattr(ops.backends, "load", lambda name: pytest.fail("the classes were reached"))
    # Nothing is asked for that is not known yet: an availability that is would load the backend.
    monkeypatch.setattr(ops.backends.registry, "_unavailable", lambda *_: None)
    arguments = {"embeddings": X.clone().requires_grad_(), "weight": W.clone(), "target": Y.clone(), **changes}
    before = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    with pytest.raises(error) as raised:
        function(**arguments)
    assert str(raised.value) == message
    for key, value in before.items():
        if isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu":
            assert torch.equal(arguments[key].float(), value.float()) and arguments[key].grad is None


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(
    ("margin", "error", "message"),
    [
        (lambda c: c.mean(), ValueError, "margin must return (N=4,); got ()"),
        (lambda c: c[:, None], ValueError, "margin must return (N=4,); got (4, 1)"),
        (lambda c: 0.5, TypeError, "margin must return a torch.Tensor; got float"),
        (lambda c: None, TypeError, "margin must return a torch.Tensor; got NoneType"),
    ],
)
def test_bad_result_of_a_margin(function: object, margin: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        function(X, W, Y, margin=margin)
    assert str(raised.value) == message


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(
    "change", [lambda c: c.half(), lambda c: c > 0, lambda c: c.to("meta")], ids=["fp16", "bool", "meta"]
)
def test_margin_of_another_dtype_or_device(function: object, change: object) -> None:
    """Rounding the target's cosine to fp16 costs 0.03 of a logit at s = 64: not in silence."""
    with pytest.raises((TypeError, ValueError), match=r"^margin must return"):
        function(X, W, Y, margin=change)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_options_are_keywords(function: object) -> None:
    with pytest.raises(TypeError, match="positional arguments"):
        function(X, W, Y, fa.ArcFace())
