"""The formulas as loops in float64, written from the papers; nothing here comes from the package."""

import math

import torch


def pair_lse(x, y, scale, keep, weight):
    """lse and mean [E, M] by plain sums, differentiable; ``keep`` [M][N], ``weight`` [E][M][N]."""
    x, y = x.double(), y.double()
    lse, mean = [], []
    for table in weight:
        for i in range(len(x)):
            logits = [scale * (x[i] @ y[j]) for j in range(len(y))]
            kept = [j for j in range(len(y)) if keep[i][j] and float(table[i][j].detach()) > 0]
            if not kept:
                lse.append(torch.tensor(-math.inf, dtype=torch.float64))
                mean.append(torch.zeros((), dtype=torch.float64))
                continue
            top = max(float(logits[j].detach()) for j in kept)
            masses = [table[i][j] * torch.exp(logits[j] - top) for j in kept]
            lse.append(top + torch.log(sum(masses)))
            mean.append(sum(m * logits[j] for m, j in zip(masses, kept)) / sum(masses))
    return torch.stack(lse).view(-1, len(x)), torch.stack(mean).view(-1, len(x))


def units(x):
    """Rows of unit length in float64; a zero row stays zero, and has cosine 0 with all."""
    x = x.double()
    length = x.norm(dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1)


def _cosine(a, b):
    """0 where one of them is zero."""
    lengths = float(a @ a) * float(b @ b)
    return float(a @ b) / math.sqrt(lengths) if lengths else 0.0


def adjusted_similarity(features, labels, num_classes, adjust=True):
    """Step 2 of EqInv, sample by sample: no class means, no product of matrices."""
    x, y = features.double(), labels.tolist()
    n = len(y)
    plain = [[0.0] * n for _ in range(num_classes)]
    for k in range(num_classes):
        anchors = [m for m in range(n) if y[m] == k]
        for i in range(n):
            if anchors:
                plain[k][i] = sum(_cosine(x[i], x[m]) for m in anchors) / len(anchors)
    scores = torch.full((num_classes, n), -math.inf, dtype=torch.float64)
    for k in range(num_classes):
        for i in range(n):
            if y[i] == k:
                continue
            peers = sorted(plain[k][m] for m in range(n) if y[m] == y[i])
            middle = (peers[(len(peers) - 1) // 2] + peers[len(peers) // 2]) / 2
            level = {True: sum(peers) / len(peers), "median": middle, False: 0.0}[adjust]
            scores[k, i] = plain[k][i] - level
    return scores


def similarity_to_own_class(features, labels):
    """Of each sample the mean cosine with all of its class, itself too."""
    x, y = features.double(), labels.tolist()
    of_class = [[m for m in range(len(y)) if y[m] == k] for k in y]
    return [sum(_cosine(x[n], x[m]) for m in own) / len(own) for n, own in enumerate(of_class)]


def context_weights(scores, labels, sharpness, cap, own=None):
    """Weights and contexts of all samples, from their similarities [C, N]: one sample and one class after the other.

    By the margin, if similarities to the ``own`` class [N] are given.
    """
    y = labels.tolist()
    highest = [max(float(s) for s in scores[:, n]) for n in range(len(y))]
    contexts = [next(k for k in range(len(scores)) if float(scores[k, n]) == highest[n]) for n in range(len(y))]
    if own is not None:
        highest = [score - mine for score, mine in zip(highest, own)]
    weights = [0.0] * len(y)
    for k in set(y):
        members = [n for n in range(len(y)) if y[n] == k]
        mean = sum(highest[n] for n in members) / len(members)
        spread = sum((highest[n] - mean) ** 2 for n in members) / max(len(members) - 1, 1)
        z = [(highest[n] - mean) / math.sqrt(spread) if spread > 1e-14 else 0.0 for n in members]
        raised = [math.exp(sharpness * min(value, cap)) for value in z]
        for n, value in zip(members, raised):
            weights[n] = value / (sum(raised) / len(members))
    return torch.tensor(weights, dtype=torch.float64), contexts


def environments(scores, labels):
    """For each class the ranked members of Env#1 and Env#2."""
    split = []
    for k, row in enumerate(scores.tolist()):
        others = [n for n, label in enumerate(labels.tolist()) if label != k]
        others.sort(key=lambda n: (-row[n], n))
        half = math.ceil(len(others) / 2)
        split.append((others[:half], others[half:]))
    return split


def class_risk(z, labels, similar, k, e, temperature, denominator="own", w=1.0, weights=None):
    """Eq. 5 of EqInv for class k in environment e (0 or 1), differentiable in z and w; None without a pair."""
    z = units(z)
    members = [i for i, label in enumerate(labels.tolist()) if label == k]
    if len(members) < 2:
        return None
    of_anchors = []
    for i in members:
        negatives = [
            a for a in range(len(z)) if labels[a] != k and (bool(similar[i, a]) if e == 0 else not bool(similar[i, a]))
        ]
        negative = sum((torch.exp(w * (z[i] @ z[a]) / temperature) for a in negatives), torch.zeros((), dtype=z.dtype))
        positives = [p for p in members if p != i]
        whole = sum(torch.exp(w * (z[i] @ z[p]) / temperature) for p in positives)
        terms = []
        for p in positives:
            own = torch.exp(w * (z[i] @ z[p]) / temperature)
            terms.append(-torch.log(own / ((own if denominator == "own" else whole) + negative)))
        of_anchors.append(sum(terms) / len(terms))
    share = [1.0 if weights is None else float(weights[i]) for i in members]
    return sum(s * term for s, term in zip(share, of_anchors)) / sum(share)


def sup_con(z, labels, temperature, weights=None):
    """SupCon over a batch (Khosla et al., 2020, Eq. 2), a (weighted) mean over the anchors that have a positive."""
    z = units(z)
    terms, share = [], []
    for i in range(len(z)):
        positives = [p for p in range(len(z)) if p != i and labels[p] == labels[i]]
        if positives:
            whole = sum(torch.exp(z[i] @ z[a] / temperature) for a in range(len(z)) if a != i)
            logs = [torch.log(torch.exp(z[i] @ z[p] / temperature) / whole) for p in positives]
            terms.append(-sum(logs) / len(logs))
            share.append(1.0 if weights is None else float(weights[i]))
    return sum(s * term for s, term in zip(share, terms)) / sum(share)


def class_wise_irm(
    z,
    labels,
    similar,
    temperature,
    weight,
    penalty="rex",
    denominator="own",
    *,
    penalised=None,
    weights=None,
    contrast="environments",
    risk_weight=1.0,
):
    """Eqs. 6 and 16 of EqInv, a mean over classes with two samples; the slope by autograd's own derivative.

    ``penalised``: the embeddings of the penalty, if not ``z``; ``contrast="batch"`` has SupCon for the risks.
    """
    losses = []
    for k in sorted(set(labels.tolist())):
        learned, risks, slopes = [], [], []
        for e in (0, 1) if (labels == k).sum() > 1 else ():
            w = torch.ones((), dtype=torch.float64, requires_grad=True)
            by_penalty = z if penalised is None else penalised
            learned.append(class_risk(z, labels, similar, k, e, temperature, denominator, 1.0, weights))
            risks.append(class_risk(by_penalty, labels, similar, k, e, temperature, denominator, w, weights))
            slopes.append(torch.autograd.grad(risks[-1], w, create_graph=True)[0])
        if risks:
            average = sum(risks) / 2
            variance = (risks[0] - average) ** 2 + (risks[1] - average) ** 2
            term = variance if penalty == "rex" else slopes[0] ** 2 + slopes[1] ** 2
            losses.append(risk_weight * sum(learned) * (contrast == "environments") + weight * term)
    loss = sum(losses) / len(losses)
    return loss + risk_weight * sup_con(z, labels, temperature, weights) if contrast == "batch" else loss


def patch_nt_xent(z, z_prime, temperature, negatives="both"):
    """SER's loss, anchor by anchor and negative by negative, differentiable; z, z_prime [B, T, D].

    Of "moved" negatives the tokens of the second view are the anchors.
    """
    z, z_prime = units(z), units(z_prime)
    images, places = z.shape[:2]
    losses = []
    for i in range(images):
        for j in range(places):
            positive = z[i, j] @ z_prime[i, j] / temperature
            logits = [positive]
            for m in range(images):
                for n in range(places):
                    if m != i and negatives == "moved":
                        logits.append(z_prime[i, j] @ z[m, n] / temperature)
                    elif m != i:
                        logits.append(z[i, j] @ z[m, n] / temperature)
                        logits.append(z[i, j] @ z_prime[m, n] / temperature)
            losses.append(minus_log_share(logits))
    return sum(losses) / len(losses)


def minus_log_share(logits):
    """-log of the first one's share of the sum of exponentials, whose digits survive where it is nearly 1."""
    top = max(float(logit.detach()) for logit in logits[1:])
    above = top + torch.log(sum(torch.exp(logit - top) for logit in logits[1:])) - logits[0]
    return torch.log1p(torch.exp(above)) if float(above.detach()) < 0 else above + torch.log1p(torch.exp(-above))


def knn_accuracy(train_features, train_labels, features, labels, k, temperature):
    right = 0
    for x, truth in zip(features.double(), labels.tolist()):
        cosines = [_cosine(x, other.double()) for other in train_features]
        nearest = sorted(range(len(cosines)), key=lambda n: -cosines[n])[:k]
        votes = {}
        for n in nearest:
            label = int(train_labels[n])
            votes[label] = votes.get(label, 0.0) + math.exp(cosines[n] / temperature)
        right += max(votes, key=votes.get) == truth
    return right / len(features)


def equimod(predicted, target, temperature):
    """The contrast of predicted embeddings [B, d] with those of all views, differentiable."""
    predicted, target = units(predicted), units(target)
    losses = []
    for i in range(len(predicted)):
        logits = [predicted[i] @ target[m] / temperature for m in range(len(target))]
        losses.append(minus_log_share([logits[i], *logits[:i], *logits[i + 1 :]]))
    return sum(losses) / len(losses)


# ------------------------------------------------------------------------------- transformations of an image, by pixels


def _pixel(image, row, column, padding):
    """The value of each channel at whole places, wherever they lie."""
    height, width = image.shape[1:]
    if padding == "zeros" and not (0 <= row < height and 0 <= column < width):
        return torch.zeros(len(image), dtype=image.dtype)
    return image[:, min(max(row, 0), height - 1), min(max(column, 0), width - 1)]


def _mirrored(place, side):
    """Reflected at the outer edges of the first and the last pixel, then at most there."""
    place = abs(place + 0.5) % (2 * side)
    place = min(place, 2 * side - place) - 0.5
    return min(max(place, 0.0), side - 1.0)


def rigid_motion(image, angle, dx, dy, padding):
    """[C, H, W] turned counter-clockwise about its centre, then moved: for each pixel, where it comes from."""
    _, height, width = image.shape
    moved, turn = torch.zeros_like(image), math.radians(angle)
    for row in range(height):
        for column in range(width):
            right, up = column - (width - 1) / 2 - dx, -(row - (height - 1) / 2 - dy)
            # Turned back: clockwise, with an axis that points up.
            x = math.cos(turn) * right + math.sin(turn) * up + (width - 1) / 2
            y = -(-math.sin(turn) * right + math.cos(turn) * up) + (height - 1) / 2
            if padding == "border":
                x, y = min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)
            elif padding == "reflection":
                x, y = _mirrored(x, width), _mirrored(y, height)
            left, top = math.floor(x), math.floor(y)
            for r, down in ((top, 1 - (y - top)), (top + 1, y - top)):
                for c, across in ((left, 1 - (x - left)), (left + 1, x - left)):
                    moved[:, row, column] += down * across * _pixel(image, r, c, padding)
    return moved


# ---------------------------------------------------------------------------------------------------------- IP-IRM


def soft_info_nce(z1, z2, weights, temperature, theta=1.0):
    """Loss of each group, row by row: the relaxed loss of IP-IRM's Step 2; None where no row counts."""
    z = units(torch.cat([z1, z2]))
    n = len(z1)
    losses = []
    for w in weights.double().T:
        numerator = denominator = 0.0
        for i in range(2 * n):
            p = (i + n) % (2 * n)
            s = [theta * (z[i] @ z[a]) / temperature for a in range(2 * n)]
            others = [a for a in range(2 * n) if a not in (i, p)]
            total = sum(w[a % n] for a in others)
            if total == 0:
                continue
            negatives = sum(w[a % n] * torch.exp(s[a]) for a in others) * (2 * n - 2) / total
            numerator = numerator + w[i % n] * (torch.log(torch.exp(s[p]) + negatives) - s[p])
            denominator = denominator + w[i % n]
        losses.append(numerator / denominator if denominator else None)
    return losses


def group_info_nce(z1, z2, group, temperature, theta=1.0):
    """SimCLR's loss within each group that has two samples, {group: loss}."""
    z1, z2 = units(z1), units(z2)
    losses = {}
    for k in sorted(set(group.tolist())):
        members = [i for i in range(len(group)) if group[i] == k]
        if len(members) < 2:
            continue
        rows = []
        for mine, other in ((z1, z2), (z2, z1)):
            for i in members:
                positive = theta * (mine[i] @ other[i]) / temperature
                logits = [theta * (mine[i] @ z[j]) / temperature for j in members if j != i for z in (z1, z2)]
                rows.append(minus_log_share([positive, *logits]))
        losses[k] = sum(rows) / len(rows)
    return losses


def slope(loss, *arguments, **options):
    """The derivative of ``loss(..., theta)`` at 1 by autograd, of each group; itself differentiable."""
    theta = torch.ones((), dtype=torch.float64, requires_grad=True)
    losses = loss(*arguments, theta=theta, **options)

    def at_one(value):
        return None if value is None else torch.autograd.grad(value, theta, create_graph=True)[0]

    return {k: at_one(v) for k, v in losses.items()} if isinstance(losses, dict) else [at_one(v) for v in losses]
