"""The losses that have layers, and those of IP-IRM's Step 1, as float64 loops; nothing here comes from the package.

``p`` holds a module's parameters and buffers by name, in float64.
"""

import math

import torch
import torch.nn.functional as F

from tests import references
from tests.references import group_info_nce, minus_log_share, slope, units


def linear(p, name, x):
    bias = p.get(f"{name}.bias", 0.0)
    return torch.stack([(p[f"{name}.weight"] * row).sum(1) + bias for row in x.flatten(0, -2)]).unflatten(
        0, x.shape[:-1]
    )


def batch_norm(p, name, x):
    """Of rows [B, D], by the statistics of the batch."""
    deviation = x - x.sum(0) / len(x)
    variance = deviation.square().sum(0) / len(x)
    return deviation / (variance + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


# ------------------------------------------------------------------------------------------------- EqInv and SER


def environment_table(features, labels, batch_labels, batch_indices):
    """similar[i][a]: is sample a of the batch in Env#1 of the class of sample i."""
    scores = references.adjusted_similarity(features, labels, int(labels.max()) + 1)
    split = references.environments(scores, labels)
    rows = [[int(a) in split[int(k)][0] for a in batch_indices] for k in batch_labels]
    return torch.tensor(rows)


def class_wise_irm(p, features, labels, similar, *, on_features=False, **settings):
    """With the default projection, or one linear layer; the penalty on its output, or on the masked features."""
    masked = features * torch.sigmoid(p["mask.weight"])
    settings["penalised"] = masked if on_features else None
    return references.class_wise_irm(projected_by(p, masked), labels, similar, **settings)


def projected_by(p, masked):
    if "projection.weight" in p:
        return linear(p, "projection", masked)
    hidden = batch_norm(p, "projection.1", linear(p, "projection.0", masked)).clamp(min=0)
    return linear(p, "projection.3", hidden)


def ser(p, tokens1, tokens2, g1, g2, temperature, negatives="both"):
    """Maps taken back through g1 and on through g2 image by image; square grids, so resizing may come last."""
    moved = []
    for i, tokens in enumerate(tokens1):
        grid = tokens.unflatten(0, g1.target).permute(2, 0, 1)
        grid = grid.rot90(-int(g1.quarter_turns[i]), (1, 2))
        grid = grid.flip(2) if g1.flip[i] else grid
        grid = grid.flip(2) if g2.flip[i] else grid
        grid = grid.rot90(int(g2.quarter_turns[i]), (1, 2))
        grid = F.interpolate(grid[None], g2.target, mode="bicubic", align_corners=False)[0]
        moved.append(grid.permute(1, 2, 0).flatten(0, 1))

    def projected(tokens):
        hidden = linear(p, "projection.0", tokens)
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        return linear(p, "projection.2", hidden)

    return references.patch_nt_xent(projected(torch.stack(moved)), projected(tokens2), temperature, negatives)


def equimod(p, features, transformed, parameters, temperature):
    def projected(x):
        x = x.sum(1) / x.shape[1] if x.dim() == 3 else x
        return linear(p, "projection.2", linear(p, "projection.0", x).clamp(min=0))

    given = torch.cat([projected(features), linear(p, "parameters_projection", parameters)], 1)
    return references.equimod(linear(p, "predictor", given), projected(transformed), temperature)


def augself(p, features1, features2, there, back, kinds):
    """Sum over augmentations of the mean over samples and both orders of the views."""
    a, b = (x.sum(1) / x.shape[1] if x.dim() == 3 else x for x in (features1, features2))
    total = 0.0
    for name, kind in kinds.items():
        errors = []
        for first, second, wanted in ((a, b, there[name]), (b, a, back[name])):
            for i in range(len(a)):
                x = torch.cat([first[i], second[i]])[None]
                for layer in (0, 2):
                    x = linear(p, f"predictors.{name}.{layer}", x).clamp(min=0)
                x = linear(p, f"predictors.{name}.4", x)[0]
                if kind == "regression":
                    errors.append((x.tanh() - wanted[i].double()).square().sum() / len(x))
                elif kind == "binary":
                    errors.append(torch.log1p(torch.exp(-x[0] if wanted[i] else x[0])))
                else:
                    errors.append(torch.exp(x).sum().log() - x[wanted[i]])
        total = total + sum(errors) / len(errors)
    return total


def selfreg(p, features, logits, labels, share, weights):
    """Sample by sample: the next of its class in the batch, round and round, and the one behind that."""
    hidden, layers = features, [name[:-7] for name in p if p[name].dim() == 2]
    for layer in layers:
        hidden = linear(p, layer, hidden)
        if len(layers) > 1:  # each with a batch norm behind it
            hidden = batch_norm(p, f"projection.{int(layer.split('.')[1]) + 1}", hidden)
            hidden = hidden if layer == layers[-1] else hidden.clamp(min=0)
    total = 0.0
    for weight, mine, theirs in ((weights[0], features, hidden), (weights[1], logits, logits)):
        for i in range(len(labels)):
            own = [j for j in range(len(labels)) if labels[j] == labels[i]]
            j, k = (own[(own.index(i) + step) % len(own)] for step in (1, 2))
            mixture = share * theirs[j] + (1 - share) * theirs[k]
            alone, mixed = (((mine[i] - other) ** 2).sum() for other in (theirs[j], mixture))
            total = total + weight * (share * alone + (1 - share) * mixed) / mine.numel()
    return total


def reconstruction(p, e1, e2, targets, patch_size):
    """Decoders [linear, (GELU, convolution, rearranged channels) x 4] on the views' tokens side by side."""
    side = math.isqrt(e1.shape[1])
    errors = []
    for d in range(len(targets)):
        x = linear(p, f"decoders.{d}.0", torch.cat([e1, e2], 2)).unflatten(1, (side, side)).permute(0, 3, 1, 2)
        for layer in (3, 6, 9, 12):
            x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
            weight = p[f"decoders.{d}.{layer}.weight"]
            x = F.conv2d(x, weight, p[f"decoders.{d}.{layer}.bias"], padding=1)
            width = {3: 4, 6: 2, 9: 1, 12: 3}[layer]
            factor = math.isqrt(x.shape[1] // width)
            x = x.unflatten(1, (width, factor, factor)).permute(0, 1, 4, 2, 5, 3).flatten(2, 3).flatten(3, 4)
        errors.append((x - targets[d]).square().sum() / x.numel())
    assert x.shape[-1] == patch_size * side
    return sum(errors) / len(errors)


# ------------------------------------------------------------------------------------------------- baselines


def mean_token(x):
    return sum(x.unbind(1)) / x.shape[1] if x.dim() == 3 else x


def layer_norm(p, name, x):
    deviation = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = deviation.square().sum(-1, keepdim=True) / x.shape[-1]
    return deviation / (variance + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def relu_mlp(p, name, x):
    return linear(p, f"{name}.2", linear(p, f"{name}.0", x).clamp(min=0))


def essl(p, features, turns):
    x = mean_token(features)
    for layer in (0, 3):
        x = layer_norm(p, f"predictor.{layer + 1}", linear(p, f"predictor.{layer}", x)).clamp(min=0)
    logits = linear(p, "predictor.6", x)
    return sum(torch.exp(z).sum().log() - z[k] for z, k in zip(logits, turns.tolist())) / len(logits)


def moved_by(matrices, conditions, x):
    """A matrix for each row: the sum over k of condition k times matrix k, which takes column d to row o."""
    width = x.shape[1]
    of_condition = [matrices[:, k * width : (k + 1) * width] for k in range(conditions.shape[1])]
    return torch.stack([sum(c * m for c, m in zip(row, of_condition)) @ y for row, y in zip(conditions, x)])


def two_sided_contrast(one, other, temperature):
    """Each row of either side finds its partner among all rows but itself."""
    z, n = units(torch.cat([one, other])), len(one)
    losses = []
    for i in range(2 * n):
        logits = {j: z[i] @ z[j] / temperature for j in range(2 * n) if j != i}
        positive = logits.pop((i + n) % (2 * n))
        losses.append(minus_log_share([positive, *logits.values()]))
    return sum(losses) / len(losses)


def stl(p, *features, temperature, weight):
    x, x_after, other, other_after = map(mean_token, features)
    predicted, targets, own, partners = [], [], [], []
    for start, end, start_of_other, end_of_other in (
        (x, x_after, other, other_after),
        (x_after, x, other_after, other),
    ):
        t = relu_mlp(p, "transformation", torch.cat([start, end], 1))
        t_of_other = relu_mlp(p, "transformation", torch.cat([start_of_other, end_of_other], 1))
        matrices = p["hypernetwork.matrices.weight"]
        predicted += [moved_by(matrices, t_of_other, start), moved_by(matrices, t, start_of_other)]
        targets += [end, end_of_other]
        own, partners = [*own, t], [*partners, t_of_other]
    embedded = (relu_mlp(p, "projection", torch.cat(rows)) for rows in (predicted, targets))
    represented = (relu_mlp(p, "transformation_projection", torch.cat(rows)) for rows in (own, partners))
    return two_sided_contrast(*embedded, temperature) + weight * two_sided_contrast(*represented, temperature)


def sie(p, features, transformed, parameters, weights):
    before, after = mean_token(features), mean_token(transformed)
    half = before.shape[1] // 2
    z, z_after = (relu_mlp(p, "heads.0", x[:, :half]) for x in (before, after))
    e, e_after = (relu_mlp(p, "heads.1", x[:, half:]) for x in (before, after))
    predicted = moved_by(p["hypernetwork.matrices.weight"], parameters, e)
    count, width = z.shape

    def covariance(u, j, k):
        means = [sum(u[:, c]) / count for c in (j, k)]
        return sum((row[j] - means[0]) * (row[k] - means[1]) for row in u) / (count - 1)

    def variance_term(u):
        deviations = [torch.sqrt(covariance(u, j, j) + 1e-4) for j in range(width)]
        return sum((1 - deviation).clamp(min=0) for deviation in deviations) / width

    def covariance_term(u):
        return sum(covariance(u, j, k) ** 2 for j in range(width) for k in range(width) if j != k) / width

    terms = [
        sum(((a - b) ** 2).sum() for a, b in zip(one, other)) / (count * width)
        for one, other in ((z, z_after), (predicted, e_after))
    ]
    terms += [sum(term(u) for u in (z, z_after, e, e_after)) for term in (variance_term, covariance_term)]
    return sum(weight * term for weight, term in zip(weights, terms)) + weights[2] * variance_term(predicted)


def cross_attention(p, tokens1, tokens2, images, patch_size, heads):
    asked, given = layer_norm(p, "norm", tokens1), layer_norm(p, "norm", tokens2)
    width = tokens1.shape[2] // heads
    columns, errors = images.shape[3] // patch_size, []
    for i in range(len(images)):
        q, k, v = (linear(p, name, x[i]) for name, x in (("query", asked), ("key", given), ("value", given)))
        for place in range(len(q)):
            found = []
            for part in (slice(h * width, (h + 1) * width) for h in range(heads)):
                shares = torch.exp(torch.stack([q[place, part] @ key[part] for key in k]) / math.sqrt(width))
                found.append(sum(share * value[part] for share, value in zip(shares / shares.sum(), v)))
            hidden = linear(p, "decoder.0", linear(p, "out", torch.cat(found)[None]))
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            painted = linear(p, "decoder.2", hidden)[0].unflatten(0, (images.shape[1], patch_size, patch_size))
            row, column = place // columns * patch_size, place % columns * patch_size
            patch = images[i, :, row : row + patch_size, column : column + patch_size]
            errors.append((painted - patch).square().sum() / patch.numel())
    return sum(errors) / len(errors)


# ------------------------------------------------------------------------------------------------- distillation


def divergence(student, teacher, temperature):
    """Mean over rows [..., C] of KL(teacher || student)."""
    rows = []
    for s, t in zip(student.flatten(0, -2) / temperature, teacher.flatten(0, -2) / temperature):
        p, q = torch.exp(s) / torch.exp(s).sum(), torch.exp(t) / torch.exp(t).sum()
        rows.append(sum(q[c] * torch.log(q[c] / p[c]) for c in range(len(q))))
    return sum(rows) / len(rows)


def distillation(student, teacher, labels, temperature, alpha, beta, smoothing):
    classes, rows = student.shape[1], []
    for z, y in zip(student, labels.tolist()):
        log_p = z - torch.exp(z).sum().log()
        rows.append(-sum(((1 - smoothing) * (c == y) + smoothing / classes) * log_p[c] for c in range(classes)))
    return alpha * sum(rows) / len(rows) + beta * divergence(student, teacher, temperature)


def feature_distillation(p, student, teacher, temperature):
    return divergence(linear(p, "connector", student), teacher, temperature)


def overhaul(p, students, teachers, layer_weights):
    total = 0.0
    for i, (student, teacher) in enumerate(zip(students, teachers)):
        places = student.movedim(1, -1) if student.dim() == 4 else student
        goals = (teacher.movedim(1, -1) if teacher.dim() == 4 else teacher).flatten(0, -2)
        found = batch_norm(p, f"connectors.{i}.norm", linear(p, f"connectors.{i}.linear", places.flatten(0, -2)))
        errors = []
        for row, goal in zip(found, goals):
            for c, t in enumerate(goal):
                t = max(float(t), float(p[f"margin{i}"][c]))
                errors.append(row[c] * 0 if float(row[c].detach()) <= t <= 0 else (t - row[c]) ** 2)
        total = total + layer_weights[i] * sum(errors) / len(errors)
    return total


def contrastive(p, student, teacher, indices, temperature, negatives):
    """With the Z of each direction that an earlier batch has set."""
    samples = len(p["bank_student"])
    generator = torch.Generator()
    generator.set_state(p["generator_state"])
    drawn = torch.randint(samples - 1, (len(indices), negatives), generator=generator)
    drawn = drawn + (drawn >= indices[:, None])  # never the row's own
    total = 0.0
    directions = ("student", student, "bank_teacher"), ("teacher", teacher, "bank_student")
    for (name, x, bank), log_z in zip(directions, p["log_z"]):
        v = units(linear(p, f"embed_{name}", x))
        masses = [
            [torch.exp(v[i] @ p[bank][j] / temperature) for j in [int(indices[i]), *drawn[i].tolist()]]
            for i in range(len(v))
        ]
        for positive, *others in masses:
            h = [x / log_z.exp() / (x / log_z.exp() + negatives / samples) for x in (positive, *others)]
            total = total - (torch.log(h[0]) + sum(torch.log(1 - x) for x in h[1:])) / len(v)
    return total


# ------------------------------------------------------------------------------------------------- IP-IRM, Step 1


def over_groups(loss, weight, everyone, partitions, global_penalty=False):
    """Step 1 of IP-IRM: ``loss(group)`` of all samples, and with its squared slope the mean over partitions' groups."""

    def risks(group, weight):
        values, slopes = loss(group, theta=1.0), slope(loss, group)
        return [values[k] + weight * slopes[k] ** 2 for k in values]

    parts = [risk for partition in partitions for risk in risks(partition, weight)]
    return sum(risks(everyone, weight * global_penalty)) + (sum(parts) / len(parts) if parts else 0)


def ip_irm(z1, z2, groups, temperature, weight, global_penalty=False):
    """Of SimCLR; ``groups`` int [P, B], of the partitions with more than one group."""

    def loss(group, theta):
        return group_info_nce(z1, z2, group, temperature, theta)

    return over_groups(loss, weight, torch.zeros(len(z1), dtype=torch.int64), groups, global_penalty)


def squared_slopes(logits, targets, weights):
    """Cross entropy of rows by their weights, and the sum of its squared derivatives in a scale of each column."""
    scale = torch.ones(1, logits.shape[1], dtype=logits.dtype, requires_grad=True)
    risk = (weights * F.cross_entropy(logits * scale, targets, reduction="none")).sum() / weights.sum()
    return risk, torch.autograd.grad(risk, scale, create_graph=True)[0].square().sum()


def ip_irm_of_logits(z1, z2, groups, temperature, weight, global_penalty=False):
    """Of SimCLR, with a dummy scale of each logit, in the authors' order: positive, then negatives of both views."""

    def terms(members):
        n, x = len(members), torch.cat([units(z1)[members], units(z2)[members]])
        similarity = x @ x.T / temperature
        own = torch.arange(n).repeat(2)
        others = similarity[own[:, None] != own].view(2 * n, 2 * n - 2)
        logits = torch.cat([torch.cat([similarity.diag(n), similarity.diag(-n)])[:, None], others], 1)
        return squared_slopes(logits, torch.zeros(2 * n, dtype=torch.int64), torch.ones(2 * n, dtype=x.dtype))

    everyone, penalty = terms(torch.arange(len(z1)))
    parts = []
    for group in groups:
        members = [(group == k).nonzero().squeeze(1) for k in sorted(set(group.tolist()))]
        parts += [terms(own) for own in members if len(own) > 1]
    mean = sum(risk + weight * squared for risk, squared in parts) / len(parts) if parts else 0
    return everyone + weight * global_penalty * penalty + mean


def sim_siam_ip_irm(p1, p2, z1, z2, groups, weight, global_penalty=False):
    p1, p2, z1, z2 = (units(part) for part in (p1, p2, z1, z2))

    def loss(group, theta):
        losses = {}
        for k in sorted(set(group.tolist())):
            members = [i for i in range(len(group)) if group[i] == k]
            cosines = [(p1[i] @ z2[i] + p2[i] @ z1[i]) / 2 for i in members]
            losses[k] = -theta * sum(cosines) / len(members)
        return losses

    return over_groups(loss, weight, torch.zeros(len(p1), dtype=torch.int64), groups, global_penalty)


def moco_ip_irm(query, key, indices, queue, owners, partitions, temperature, weight):
    """``partitions`` int [P, N], of more than one group each; ``owners`` [queue], -1 for nobody's key."""
    query, key = units(query), units(key)

    def loss(group_of, theta):
        losses = {}
        for k in sorted({group_of(int(index)) for index in indices}):
            rows = []
            for i, index in enumerate(indices.tolist()):
                if group_of(index) != k:
                    continue
                own = [j for j, owner in enumerate(owners.tolist()) if owner != index and group_of(owner) == k]
                if own:
                    logits = [theta * (query[i] @ queue[j]) / temperature for j in own]
                    rows.append(minus_log_share([theta * (query[i] @ key[i]) / temperature, *logits]))
            if rows:
                losses[k] = sum(rows) / len(rows)
        return losses

    def of_partition(partition):
        return lambda index: int(partition[index]) if index >= 0 else -1

    return over_groups(loss, weight, lambda index: 0, [of_partition(partition) for partition in partitions])
