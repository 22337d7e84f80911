"""What accounting says about MoRA from a config alone, against live adapted models: parameters and MACs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny_models import BERT, DECODERS, ENCODERS, live, read
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, BertConfig, BertModel

from rankbits import MoraConfig, cost
from rankbits.accounting.architectures.read import Head, find_config, read_shape
from rankbits.accounting.methods import adapter_elements, adapter_products
from rankbits.accounting.mora import BLOCKWISE, mora_side
from rankbits.accounting.params import count
from rankbits.accounting.spec import Linear, Method, MethodSpec, MoraForm
from rankbits.accounting.weights import adapter_sizes
from rankbits.tuners.mora import MoraType

# PEFT asks transformers for a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
FAMILIES = {"bert": ENCODERS["bert"], "deberta": ENCODERS["deberta-v3"]} | {
    name: DECODERS[name] for name in ("llama", "qwen2", "gpt2", "opt")
}
ROWS = 5


def _trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("values", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", None])
@pytest.mark.parametrize("r", [1, 2])
def test_a_live_model_trains_as_many_parameters_as_predicted(values: dict[str, Any], targets: Any, r: int) -> None:
    head = Head.LANGUAGE_MODEL if values["model_type"] in {"llama", "qwen2", "gpt2", "opt"} else Head.NONE
    shape, spec = read(values, head), MethodSpec(Method.MORA, rank=r, targets=targets)
    model = get_peft_model(live(values, head), MoraConfig(r=r, target_modules=targets))
    assert _trained(model) == count(shape, spec).trainable > 0
    assert sorted(p.numel() for p in model.parameters() if p.requires_grad) == sorted(
        size for size in adapter_sizes(shape, spec) if size
    )


@pytest.mark.parametrize(
    ("name", "targets", "parameters"),
    [
        ("minilm-l6", ["query", "key", "value"], 109_512),
        # 110^2 for each of 24 and 256^2 for each of 64 matrices.
        ("bert-base", ["query", "value"], 290_400),
        ("llama-7b", ["q_proj", "v_proj"], 4_194_304),
    ],
)
def test_models_of_published_sizes(name: str, targets: list[str], parameters: int) -> None:
    values = find_config(name)
    with torch.device("meta"):
        base = AutoModel.from_config(AutoConfig.for_model(**values))
    model = get_peft_model(base, MoraConfig(r=8, target_modules=targets), low_cpu_mem_usage=True)
    shape = read_shape(values, name=name, head=Head.NONE)
    assert _trained(model) == parameters
    assert count(shape, MethodSpec(Method.MORA, rank=8, targets=tuple(targets))).trainable == parameters


@pytest.mark.parametrize(
    ("d_in", "d_out", "r", "kind"),
    [
        (48, 80, 4, "rotation"),
        (80, 48, 4, "rotation"),
        (172, 64, 2, "rotation"),
        (64, 172, 2, "rotation"),
        (48, 48, 2, "rotation"),
        (300, 280, 64, "sharing"),
        (280, 300, 100, "sharing"),
    ],
)
def test_macs_of_a_live_layer(d_in: int, d_out: int, r: int, kind: str) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(d_in, d_out)), MoraConfig(r=r, target_modules=["0"]))
    assert model.peft_config["default"].kind.value == kind
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(ROWS, d_in))
    spec, linear = MethodSpec(Method.MORA, rank=r), Linear("0", d_in, d_out)
    products = adapter_products(linear, spec, ROWS)
    assert counter.get_total_flops() == 2 * (ROWS * d_in * d_out + sum(product.macs for product in products))
    compressed = next(work.elements for work in adapter_elements(linear, spec, ROWS) if work.op == "compress")
    assert compressed == products[0].m * products[0].k


@pytest.mark.parametrize("kind", [kind.value for kind in MoraType])
@pytest.mark.parametrize("rounding", ["nearest", "floor"])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(("d_in", "d_out"), [(48, 80), (172, 64)])
def test_macs_and_parameters_of_every_type(kind: str, rounding: str, fold: bool, d_in: int, d_out: int) -> None:
    fold = fold and kind in BLOCKWISE
    config = MoraConfig(r=3, mora_type=kind, rounding=rounding, fold=fold, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(d_in, d_out)), config)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(ROWS, d_in))
    form = MoraForm(kind, floor=rounding == "floor", fold=fold)
    spec, linear = MethodSpec(Method.MORA, rank=3, mora=form), Linear("0", d_in, d_out)
    products = adapter_products(linear, spec, ROWS)
    assert counter.get_total_flops() == 2 * (ROWS * d_in * d_out + sum(product.macs for product in products))
    assert mora_side(linear, spec) ** 2 == _trained(model)


def test_the_live_count_names_the_product_and_the_matrix() -> None:
    torch.manual_seed(0)
    base = BertModel(BertConfig(**BERT))
    spec = MethodSpec(Method.MORA, rank=2, targets=("query", "dense"))
    shape = read(ENCODERS["bert"], Head.NONE)
    model = get_peft_model(base, MoraConfig(r=2, target_modules=["query", "dense"])).eval()
    costs = cost(model, sequence_length=6, adapters="unmerged")
    found = sorted((p.module, p.op, p.m, p.k, p.n, p.right) for p in costs.products if p.adapter is not None)
    linears = {linear.name: linear for linear in shape.linears()}
    expected = []
    for module, *_ in found:
        rows = 1 if module.startswith("pooler") else 6
        expected += [(p.module, p.op, p.m, p.k, p.n, p.right) for p in adapter_products(linears[module], spec, rows)]
    assert found == sorted(expected)
    weights = [w for w in costs.weights if w.adapter is not None]
    assert {w.operand for w in weights} == {"M"}
    assert sum(w.elements for w in weights) == count(shape, spec).trainable
    assert not [p for p in cost(model, sequence_length=6, adapters="merged").products if p.adapter is not None]
