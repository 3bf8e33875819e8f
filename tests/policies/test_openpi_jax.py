"""JAX parameters become PyTorch weights that compute the same: openpi's einsums against plain matrix products."""

import numpy as np
import pytest
from numpy.random import default_rng
from openpi_checkpoints import Leaf, jax_parameters

from grasp_cube.policies.openpi_jax import EXPERT, LANGUAGE, PROJECTOR, VISION, JaxTensors, open_params
from grasp_cube.policies.policy import PolicyError

LAYERS, HEADS, KV, WIDTH, SIZE, FEED = 2, 4, 1, 12, 6, 20
RANK = 3


def tensors(params: dict[str, np.ndarray]) -> JaxTensors:
    return JaxTensors(
        {name: Leaf(a.shape, a.dtype) for name, a in params.items()}, params.__getitem__, "here"
    )


def weights(params: dict[str, np.ndarray], name: str) -> np.ndarray:
    return tensors(params).get(name).numpy()


def lora(params: dict[str, np.ndarray], seed: int = 3) -> dict[str, np.ndarray]:
    """Adapters for both language models, with openpi's names and shapes."""
    random = default_rng(seed)
    added = {}
    for name, array in params.items():
        if "/layers/" not in name or not ("einsum" in name or name.endswith("linear")):
            continue
        stem = name.removesuffix("w") if name.endswith("/w") else f"{name}_"
        shape_a, shape_b = list(array.shape), list(array.shape)
        shape_a[-1], shape_b[-2] = RANK, RANK
        added[f"{stem}lora_a"] = random.normal(size=shape_a).astype(np.float32)
        added[f"{stem}lora_b"] = random.normal(size=shape_b).astype(np.float32)
    return params | added


def einsum(equation: str, x: np.ndarray, params: dict[str, np.ndarray], stem: str, layer: int) -> np.ndarray:
    """openpi's einsum with its adapter: the label of the last axis becomes L for the first factor, that of the last
    but one for the second."""
    left, right, out = equation.replace("->", ",").split(",")
    weight = params[f"{stem}/w"][layer]
    result = np.einsum(equation, x, weight)
    if f"{stem}/lora_a" in params:
        a, b = params[f"{stem}/lora_a"][layer], params[f"{stem}/lora_b"][layer]
        between = out.replace(right[-1], "L")
        inner = np.einsum(f"{left},{right.replace(right[-1], 'L')}->{between}", x, a)
        result = result + np.einsum(f"{between},{right.replace(right[-2], 'L')}->{out}", inner, b)
    return result


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "lora"])
def params(request) -> dict[str, np.ndarray]:
    plain = jax_parameters(
        "pi0", layers=LAYERS, heads=HEADS, kv=KV, width=WIDTH, expert_width=WIDTH - 4, size=SIZE, feed=FEED
    )
    return lora(plain) if request.param else plain


@pytest.mark.parametrize(("suffix", "model", "width"), [("", LANGUAGE, WIDTH), ("_1", EXPERT, WIDTH - 4)])
def test_attention_and_feed_forward_compute_the_same(params, suffix, model, width):
    """Each projection of the last layer on random tokens; the output projection's adapter is summed over the heads."""
    layer, llm = LAYERS - 1, "PaliGemma/llm/layers"
    x = default_rng(8).normal(size=(5, width)).astype(np.float32)
    here = f"{model}.layers.{layer}"

    def close(ours: np.ndarray, theirs: np.ndarray) -> None:
        np.testing.assert_allclose(ours, theirs.reshape(len(ours), -1), rtol=1e-4, atol=1e-3)

    close(
        x @ weights(params, f"{here}.self_attn.q_proj.weight").T,
        einsum("TD,NDH->TNH", x, params, f"{llm}/attn/q_einsum{suffix}", layer),
    )
    k, v = einsum("SD,CKDH->CSKH", x, params, f"{llm}/attn/kv_einsum{suffix}", layer)
    close(x @ weights(params, f"{here}.self_attn.k_proj.weight").T, k)
    close(x @ weights(params, f"{here}.self_attn.v_proj.weight").T, v)
    encoded = default_rng(9).normal(size=(5, HEADS, SIZE)).astype(np.float32)
    close(
        encoded.reshape(5, -1) @ weights(params, f"{here}.self_attn.o_proj.weight").T,
        einsum("TNH,NHD->TD", encoded, params, f"{llm}/attn/attn_vec_einsum{suffix}", layer),
    )

    def feed(x: np.ndarray, name: str, *index: int) -> np.ndarray:
        """openpi's feed-forward product: x w + (x a) b, without a scale."""
        pick = (layer, *index)
        result = x @ params[name][pick]
        if f"{name}_lora_a" in params:
            result = result + (x @ params[f"{name}_lora_a"][pick]) @ params[f"{name}_lora_b"][pick]
        return result

    mlp = f"{llm}/mlp{suffix}"
    close(x @ weights(params, f"{here}.mlp.gate_proj.weight").T, feed(x, f"{mlp}/gating_einsum", 0))
    close(x @ weights(params, f"{here}.mlp.up_proj.weight").T, feed(x, f"{mlp}/gating_einsum", 1))
    inner = default_rng(10).normal(size=(5, FEED)).astype(np.float32)
    close(inner @ weights(params, f"{here}.mlp.down_proj.weight").T, feed(inner, f"{mlp}/linear"))


def test_the_vision_tower_computes_the_same():
    """Patches by convolution, attention of many heads, and the projector, as Flax's modules apply their kernels."""
    import torch

    params = jax_parameters("pi0", layers=LAYERS, heads=HEADS, width=WIDTH, size=SIZE)
    random = default_rng(4)
    kernel = params["PaliGemma/img/embedding/kernel"]
    patch = random.normal(size=kernel.shape[:3]).astype(np.float32)
    conv = tensors(params).get(f"{VISION}.embeddings.patch_embedding.weight")
    ours = torch.nn.functional.conv2d(torch.from_numpy(patch).permute(2, 0, 1)[None], conv).flatten()
    np.testing.assert_allclose(ours, np.einsum("hwc,hwcd->d", patch, kernel), rtol=1e-4, atol=1e-4)

    block, layer = "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0", 1
    here = f"{VISION}.encoder.layers.{layer}.self_attn"
    width = params[f"{block}/query/kernel"].shape[1]
    x = random.normal(size=(5, width)).astype(np.float32)
    for jax, torch_name in (("query", "q"), ("key", "k"), ("value", "v")):
        theirs = np.einsum("td,dhk->thk", x, params[f"{block}/{jax}/kernel"][layer])
        theirs = theirs + params[f"{block}/{jax}/bias"][layer]
        ours = x @ weights(params, f"{here}.{torch_name}_proj.weight").T
        ours = ours + weights(params, f"{here}.{torch_name}_proj.bias")
        np.testing.assert_allclose(ours, theirs.reshape(5, -1), rtol=1e-4, atol=1e-4)
    kernel = params[f"{block}/out/kernel"][layer]
    heads = random.normal(size=(5, *kernel.shape[:2])).astype(np.float32)
    ours = heads.reshape(5, -1) @ weights(params, f"{here}.out_proj.weight").T
    np.testing.assert_allclose(ours, np.einsum("thk,hkd->td", heads, kernel), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(
        weights(params, f"{PROJECTOR}.weight"), params["PaliGemma/img/head/kernel"].T
    )


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_shapes_and_precision_without_reading(kind):
    """What a writer must know before it reads the first value."""
    params = jax_parameters(kind, layers=LAYERS)
    lazy = tensors(params)
    assert lazy.kind == kind
    for name in lazy.keys():  # noqa: SIM118
        assert lazy.shape(name) == tuple(lazy.get(name).shape), name
        assert lazy.dtype(name) == "float32"
    adaptive = f"{EXPERT}.layers.0.input_layernorm.dense.weight"
    assert (adaptive in set(lazy.keys())) == (kind == "pi05")


def test_missing_and_unread_parameters_are_named():
    params = jax_parameters("pi05", layers=1)
    with pytest.raises(PolicyError, match=r"1 missing \(time_mlp_out/bias\)"):
        tensors({name: array for name, array in params.items() if name != "time_mlp_out/bias"})
    with pytest.raises(PolicyError, match=r"1 that nothing reads \(state_proj/kernel\)"):
        tensors(params | {"state_proj/kernel": params["time_mlp_in/kernel"]})
    with pytest.raises(
        PolicyError, match=r"that nothing reads \(PaliGemma/llm/layers/attn/q_einsum/lora_c\)"
    ):
        tensors(params | {"PaliGemma/llm/layers/attn/q_einsum/lora_c": np.ones((1, 1), np.float32)})


@pytest.mark.parametrize("trained", [False, True])
def test_a_directory_that_orbax_wrote(tmp_path, trained):
    """As published (plain leaves) and as training saves them (each under `value`), in bfloat16 and float32."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    from openpi_checkpoints import save_params

    params = jax_parameters("pi0", layers=1)
    embedding = "PaliGemma/llm/embedder/input_embedding"
    params[embedding] = params[embedding].astype(ml_dtypes.bfloat16)
    save_params(tmp_path / "params", params, trained=trained)
    lazy = open_params(tmp_path / "params")
    assert set(lazy.keys()) == set(tensors(params).keys())
    assert lazy.dtype(f"{LANGUAGE}.embed_tokens.weight") == "bfloat16"
    read = lazy.get(f"{LANGUAGE}.embed_tokens.weight")
    np.testing.assert_array_equal(read.float().numpy(), params[embedding].astype(np.float32))
    for name in ("state_proj.weight", f"{LANGUAGE}.layers.0.mlp.up_proj.weight"):
        np.testing.assert_array_equal(lazy.get(name).numpy(), weights(params, name))


def test_a_damaged_directory(tmp_path):
    (tmp_path / "params").mkdir()
    with pytest.raises(PolicyError, match="no parameter directory that openpi saved"):
        open_params(tmp_path / "params")


def test_without_orbax_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "orbax.checkpoint", None)
    with pytest.raises(PolicyError, match=r"pip install 'grasp-cube\[jax\]'"):
        open_params(tmp_path)
