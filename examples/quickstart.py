"""Two clients, real digits, epsilon 10: release, train both models, sample, account, attack.

    python examples/quickstart.py [FOLDER]

About a minute on one core; samples.png and the clients' stores are left in FOLDER (default:
quickstart). It shows the steps, not quality: the models are tiny and hardly trained.
"""

import sys
from pathlib import Path

import numpy as np

import fedpdm
from fedpdm.reporting.pictures import draw_image_grid

out = Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart")
config = fedpdm.configure(
    name="quickstart",
    data={"name": "digits", "classes": [0, 1, 2, 3]},
    partition={"num_clients": 2, "majority_classes": 2, "majority_ratio": 10},
    privacy={"epsilon": 10, "delta": 1e-5, "clip_norm": 5},
    coarse={"preset": "micro"},
    fine={"preset": "micro"},
    sampling={"num_steps": 15, "guidance": 1.5},
)

# Two clients, each rich in two of the four digits.
clients = fedpdm.share_out(config, fedpdm.load_images(config))
for number, images in enumerate(clients):
    print(f"client {number}: images per digit {np.bincount(images.labels).tolist()}")

# What the budget buys: the step t0 up to which every image is noised before it leaves.
linear = fedpdm.make_schedule("linear")
setting = fedpdm.calibrate(linear, epsilon=10, delta=1e-5, clip_norm=5)
print(f"epsilon {setting.epsilon:.3f} at t0 = {setting.t0}, noise {setting.sigma:.2f} per pixel")

# Each client noises its images once; the ledger in its store says what that cost.
stores = [out / "clients" / str(number) for number in range(len(clients))]
pairs = zip(clients, stores, strict=True)
releases = [fedpdm.release(config, *pair, client=m) for m, pair in enumerate(pairs)]
print(f"client 0's ledger: epsilon {fedpdm.account(stores[0]).largest:.3f} per image")

# The shared model sees releases only, client 0's own model its raw images.
coarse = fedpdm.train_coarse(config, releases, num_steps=100)
fine = fedpdm.train_fine(config, clients[0], num_steps=200)

# Coarse from pure noise to t0, fine from there on; and each of them alone.
labels = np.repeat([0, 1, 2, 3], 8)
drawn_by = {"coarse, fine": (coarse, fine), "fine alone": (None, fine), "coarse": (coarse, None)}
rows = [fedpdm.sample(config, *models, labels, seed=1) for models in drawn_by.values()]
draw_image_grid(out / "samples.png", rows, row_labels=list(drawn_by))

# What the server could learn from the uploads, and whoever gets a model from the model.
link = fedpdm.attack_uploads(config, clients[0], stores[0])
print(f"linkage of uploads: AUC {link.auc:.3f}; the noise implies {link.auc_analytic:.3f}")
others = fedpdm.load_images(config, "test")
for target in ("coarse", "fine"):
    found = fedpdm.attack_model(config, clients[0], others, coarse=coarse, fine=fine, target=target)
    print(f"membership, {target} model: AUC {found.scores.auc.value:.3f}")
