# csrc/bindings.cpp: the compiled kernels over raw addresses, for fused_arcface.backends.cpu, and the rows of files, for
# fused_arcface.store. A build with CUDA has a
# submodule `cuda` besides (csrc/cuda/bindings.cpp), for fused_arcface.backends.cuda.
_Matrix = tuple[int, int, int, int, int, int]  # address, dtype code, rows, columns, row stride, column stride
_Logistic = tuple[float, float, float, float, float, bool]  # scale, exponent, angle, offset, bias, by bias
# sub-centers, address of thresholds or 0, (a, b, d, e), logistic
_Negatives = tuple[int, int, tuple[float, float, float, float], _Logistic | None]

FLOAT32: int
FLOAT64: int
BFLOAT16: int
FLOAT16: int

def isas() -> list[str]: ...
def isa() -> str: ...
def has_products(product: int) -> bool: ...
def class_stats(
    product: int,
    embeddings: _Matrix,
    weight: _Matrix,
    target: int,
    scale: float,
    shift: int,
    negative_max: int,
    negative_sum: int,
    center_sum: int,
    threads: int,
    negatives: _Negatives,
    moments: int,
) -> None: ...
def weight_grad(
    product: int,
    embeddings: _Matrix,
    weight: _Matrix,
    target: int,
    scale: float,
    lse: int,
    negative_coefficient: int,
    target_coefficient: int,
    d_weight: _Matrix,
    threads: int,
    negatives: _Negatives,
    negative_grad: int,
) -> None: ...

NO_MOMENTUM: int
MOMENTUM_FLOAT64: int
MOMENTUM_FLOAT32: int
MOMENTUM_BFLOAT16: int
MOMENTUM_INT8: int

def update_centers(
    product: int,
    embeddings: _Matrix,
    weight: _Matrix,
    target: int,
    scale: float,
    lse: int,
    negative_coefficient: int,
    target_coefficient: int,
    center_step: tuple[int, int, int, int, int, float, float, float, int, int, int],
    threads: int,
    negatives: _Negatives,
) -> None: ...
def target_cosine(
    compute: int, embeddings: _Matrix, weight: _Matrix, target: int, cosine: int, threads: int
) -> None: ...
def finish_negatives(
    compute: int,
    rows: int,
    columns: int,
    negative_sum: int,
    shift: int,
    center_sum: int,
    lse: int,
    mean_center: int,
) -> None: ...
def unit_embedding_grad(
    compute: int,
    weight: _Matrix,
    target: int,
    mean_center: int,
    negative_coefficient: int,
    target_coefficient: int,
    rows: int,
    d_unit: int,
    threads: int,
) -> None: ...
def embedding_grad(compute: int, d_unit: int, embeddings: _Matrix, d_embeddings: _Matrix, threads: int) -> None: ...
def margin_loss(
    compute: int,
    negative_lse: int,
    target_cosine: int,
    rows: int,
    scale: float,
    factors: tuple[float, float, float],
    boundary: str,
    straight_through: bool,
    out: tuple[int, int, int, int],
) -> None: ...
def multiply_adds(product: int, rounds: int, threads: int) -> int: ...
def transfer_records(
    write: bool, file: int, record_bytes: int, rows: int, count: int, fields: list[tuple[int, int]], threads: int
) -> int: ...
