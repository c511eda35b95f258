"""The models again, in plain NumPy and float64, one text at a time and without a cache.

Written from the papers' formulas, not from the package: the tests compare the two.
"""

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def rms_norm(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def rotate(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    """One token's heads `[heads, E]`: dimension i turns with dimension i + E / 2."""
    half = x.shape[-1] // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / x.shape[-1])
        out[:, i] = x[:, i] * np.cos(angle) - x[:, i + half] * np.sin(angle)
        out[:, i + half] = x[:, i + half] * np.cos(angle) + x[:, i] * np.sin(angle)
    return out


def attention(layer: dict, query_in: np.ndarray, inputs: list, at: list, shape) -> np.ndarray:
    """Attention of the last of the tokens with the given inputs and positions over all of them."""
    E, theta = shape.head_size, shape.rope_theta
    queries = rotate((query_in @ layer["query"]["weight"].T).reshape(-1, E), at[-1], theta)
    keys = [
        rotate((x @ layer["key"]["weight"].T).reshape(-1, E), p, theta)
        for x, p in zip(inputs, at, strict=True)
    ]
    values = [(x @ layer["value"]["weight"].T).reshape(-1, E) for x in inputs]
    heads = []
    for h, q in enumerate(queries):
        g = h * shape.kv_heads // shape.heads
        scores = np.array([q @ k[g] for k in keys]) / np.sqrt(E)
        weights = np.exp(log_softmax(scores))
        heads.append(sum(w * v[g] for w, v in zip(weights, values, strict=True)))
    return np.concatenate(heads) @ layer["out"]["weight"].T


def mlp(layer: dict, x: np.ndarray) -> np.ndarray:
    gate = x @ layer["gate"]["weight"].T
    return (gate / (1 + np.exp(-gate)) * (x @ layer["up"]["weight"].T)) @ layer["down"]["weight"].T


def float64(tree):
    if isinstance(tree, dict):
        return {k: float64(v) for k, v in tree.items()}
    return np.asarray(tree, np.float64)


def target_text(params: dict, shape, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(logits `[T, V]`, inputs of every layer `[layers, T, D]`) of a whole text."""
    p = float64(params)
    x = p["embedding"]["embedding"][np.asarray(tokens)]
    at = list(range(len(tokens)))
    inputs = []
    for i in range(shape.layers):
        inputs.append(x)
        layer = p[f"layers_{i}"]
        normed = rms_norm(x, layer["attention_norm"]["scale"], shape.norm_epsilon)
        x = x + np.stack(
            [attention(layer["attention"], normed[t], list(normed[: t + 1]), at[: t + 1], shape) for t in at]
        )
        x = x + mlp(layer["mlp"], rms_norm(x, layer["mlp_norm"]["scale"], shape.norm_epsilon))
    final = rms_norm(x, p["norm"]["scale"], shape.norm_epsilon)
    head = p["embedding"]["embedding"].T if shape.tied_head else p["head"]["weight"].T
    return final @ head, np.stack(inputs)


def drafter_window(
    params: dict,
    shape,
    embedding: np.ndarray,
    taps: np.ndarray,
    tokens: list[int],
    anchor: int,
    steps: int,
    choose,
) -> np.ndarray:
    """EAGLE-3: logits `[K, N]` of one window, token by token.

    Position p pairs the feature of position p with the embedding of token p + 1; inside the window the
    drafter's own last hidden state takes the feature's place. `choose(step, logits)` is the token that
    the window goes on with.
    """
    p, emb = float64(params), np.asarray(embedding, np.float64)
    eps = shape.norm_epsilon

    def pair(token: int, feature: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [
                rms_norm(emb[token], p["embedding_norm"]["scale"], eps),
                rms_norm(feature, p["hidden_norm"]["scale"], eps),
            ]
        )

    def layers(residuals: list, pairs: list) -> np.ndarray:
        """The hidden state of the last position, after all layers; every position sees those before it."""
        x, inputs, deeper = list(residuals), pairs, [p]
        deeper += [p[f"layers_{i}"] for i in range(shape.layers - 1)]
        for number, layer in enumerate(deeper):
            if number:
                inputs = [rms_norm(h, layer["attention_norm"]["scale"], eps) for h in x]
            for t in range(len(x)):
                at = list(range(t + 1))
                x[t] = x[t] + attention(layer["attention"], inputs[t], inputs[: t + 1], at, shape)
                x[t] = x[t] + mlp(layer["mlp"], rms_norm(x[t], layer["mlp_norm"]["scale"], eps))
        return x[-1]

    features = list(np.asarray(taps, np.float64) @ p["fuse"]["weight"].T)[: anchor + 1]
    pairs, logits = [pair(tokens[t + 1], features[t]) for t in range(anchor + 1)], []
    for step in range(steps):
        normed = [rms_norm(f, p["hidden_norm"]["scale"], eps) for f in features]
        features.append(layers(normed if shape.normed_residual else features, pairs))
        logits.append(rms_norm(features[-1], p["norm"]["scale"], eps) @ p["head"]["weight"].T)
        pairs.append(pair(choose(step, logits[-1]), features[-1]))
    return np.stack(logits)
