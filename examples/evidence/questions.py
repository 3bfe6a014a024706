"""What the report asks: for each question the arms that are compared, and what the paper says."""

from __future__ import annotations

from typing import NamedTuple


class Comparison(NamedTuple):
    """Arms of one group against its base; ``title`` names the setting, ``arms`` what each of them is."""

    group: str
    title: str
    arms: dict[str, str]
    base: str = "off"


class Question(NamedTuple):
    key: str
    title: str
    text: str
    comparisons: tuple[Comparison, ...]


PLACES = {
    "vipriors-10": "VIPriors-10",
    "vipriors-20": "VIPriors-20",
    "vipriors-50": "VIPriors-50",
    "cifar10-20": "CIFAR-10, 20 per class",
    "pacs": "PACS, context shift",
    "digits": "coloured digits",
}

QUESTIONS = (
    Question(
        "eqinv",
        "Does EqInv help a classifier that is fine-tuned on few labels?",
        "A network pretrained by SimCLR on all 2,500 training images of VIPriors without labels (the ones of "
        "CIFAR-10 and PACS start from it, too) is fine-tuned by cross entropy, and again with `ClassWiseIRM` beside "
        "it: environments by adjusted similarity of the frozen features, REx, the backbone out of the penalty's "
        "reach, as in the paper. Coloured digits are trained from scratch as in `examples/quickstart.py` (IRMv1, "
        "open backbone); their accuracy is that on digits in another class's colour. On PACS each class is seen in "
        "a domain of its own in 95% of its training images; validation and test images are spread evenly over the "
        "domains, so λ is chosen under the test's shift, as it was on the digits. The base has no such setting to "
        "choose. The paper, ResNet-50 on full-size images: +5.1 points on VIPriors-50, +7.9 on -20, +8.2 on -10 "
        "over MoCo-v2.",
        tuple(Comparison(group, title, {"on": "+ ClassWiseIRM"}) for group, title in PLACES.items()),
    ),
    Question(
        "eqinv-parts",
        "Which part of EqInv does it?",
        "The same with one thing changed, and the λ of the first column: environments by plain instead of adjusted "
        "similarity; environments drawn at random; the backbone open to the penalty (with a λ of its own choice); "
        "on the digits, the contrastive risk without its penalty.",
        (
            *(
                Comparison(
                    group,
                    PLACES[group],
                    {
                        "on": "adjusted, frozen",
                        "plain": "plain similarity",
                        "random": "random environments",
                        "open": "open backbone",
                    },
                )
                for group in ("vipriors-20", "pacs")
            ),
            Comparison(
                "digits",
                PLACES["digits"],
                {"on": "adjusted, open", "weight 0": "without the penalty", "random": "random environments"},
            ),
        ),
    ),
    Question(
        "ser",
        "Does soft equivariance of an early layer help a self-supervised ViT?",
        "MoCo-v3 on CIFAR-10 images without labels, then linear probes and k-NN on the frozen class token, there "
        "and on images of other classes (VIPriors). The control has the turned and scaled views and the late class "
        "token, and weight 0. The paper, ViT-S/16 on ImageNet: 68.44 → 69.28 in linear accuracy, 68.82 with weight "
        "0.",
        (Comparison("ser", "", {"views": "views alone (weight 0)", "on": "+ SERLoss"}),),
    ),
    Question(
        "reconstruction",
        "Does transformed image reconstruction make features tell more?",
        "VICReg on CIFAR-10 images without labels: with decoders that only look on, and with those of one and of "
        "two intermediate images that half of the features learn from. The paper's R² (ViT-S/16, ImageNet): 0.998 "
        "rotation, 0.980 translation, 0.937 colour, 0.969 blur with two images; 0.29, 0.42, 0.47, 0.87 with one.",
        (Comparison("reconstruction", "", {"one": "1 image", "two": "2 images"}),),
    ),
    Question(
        "ipirm",
        "Do partitions disentangle features that are worth more?",
        "SimCLR on the VIPriors training images without labels, without and with a new partition every few epochs. "
        "The time of a step includes its share of the searches. The paper, ResNet-50, 50 images per class: 34.6 → "
        "36.1 in linear accuracy.",
        (Comparison("ipirm", "", {"on": "+ partitions"}),),
    ),
)
