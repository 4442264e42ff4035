"""Examples of the commands that give none themselves, shown by their --help.

A test parses every line.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["EXAMPLES"]

EXAMPLES: Mapping[str, str] = {
    "run": """\
  fedpdm run experiments/digits.yaml
  fedpdm run experiments/digits.yaml --set privacy.epsilon=3 --out runs/eps3
  fedpdm run experiments/digits.yaml --set run.trackers=[tensorboard] --engine inprocess
  fedpdm run experiments/digits.yaml --dry-run
  fedpdm run --resume --out runs/eps3 --quiet
  fedpdm run --resume --out runs/eps3 --set run.rounds=20
  fedpdm run experiments/digits.yaml --sweep privacy.epsilon=1,3,10 --out runs/epsilons
""",
    "show": """\
  fedpdm show runs/eps3
  fedpdm show runs/eps3 --json
""",
    "stop": """\
  fedpdm stop
  fedpdm stop runs/eps3
  fedpdm stop --all
""",
    "config": """\
  fedpdm config
""",
    "completion": """\
  fedpdm completion bash > ~/.local/share/bash-completion/completions/fedpdm
  fedpdm completion zsh > ~/.zfunc/_fedpdm
""",
    "ledger": """\
  fedpdm ledger runs/eps3
  fedpdm ledger runs/eps3/clients/0 --head 5f1c --json
""",
    "tables": """\
  fedpdm tables
  fedpdm tables --experiments experiments --out docs/results.md
""",
    "attack linkage": """\
  fedpdm attack linkage --data mnist --epsilon 10 --clip-norm 10 --out linkage
""",
    "attack audit": """\
  fedpdm attack audit --data folder --t0 690 --clip-norm 10 --canaries 10000
  fedpdm attack audit --epsilon 10 --clip-norm 10 --seeded 0 --known-seed 0
""",
    "attack models": """\
  fedpdm attack runs/eps3 --out attacks/eps3
  fedpdm attack runs/eps3 --attacks pia,secmi --clients 0,1 --out attacks/eps3
  fedpdm attack --unet unet --members train.npz --non-members test.npz --out attacks/unet
""",
    "attack controls": """\
  fedpdm attack controls --attacks loss,pia --out attacks/controls
""",
    "federation": """\
  fedpdm federation start --node-keys keys
  fedpdm federation run experiments/digits.yaml --out runs/together
  fedpdm federation status
  fedpdm federation stop
""",
    "federation start": """\
  fedpdm federation start --node-keys keys --certificates certificates
  fedpdm federation start --fleet 0.0.0.0:9092 --foreground
""",
    "federation run": """\
  fedpdm federation run experiments/digits.yaml --out runs/together
  fedpdm federation run --resume --out runs/together
""",
    "federation status": """\
  fedpdm federation status --json
""",
    "federation stop": """\
  fedpdm federation stop
""",
    "node": """\
  fedpdm node check --coordinator host:9092 --certificate node-0.crt --data images
  fedpdm node start --coordinator host:9092 --certificate node-0.crt --data images
""",
    "node check": """\
  fedpdm node check --coordinator host:9092 --certificate node-0.crt --data images
  fedpdm node check --coordinator host:9092 --certificate node-0.crt --data images --accept
""",
    "node start": """\
  fedpdm node start --coordinator host:9092 --certificate node-0.crt --data images
""",
    "node invite": """\
  fedpdm node invite experiments/digits.yaml --out invitation.json
""",
    "node digest": """\
  fedpdm node digest
""",
    "certificates": """\
  fedpdm certificates ca --out authority
  fedpdm certificates server --ca authority --name host.example --out certificates
  fedpdm certificates node --ca authority --client 0 --out node0
""",
    "certificates ca": """\
  fedpdm certificates ca --out authority --days 3650
""",
    "certificates server": """\
  fedpdm certificates server --ca authority --name host.example --out certificates
""",
    "certificates node": """\
  fedpdm certificates node --ca authority --client 0 --out node0
""",
    "certificates request": """\
  fedpdm certificates request --client 0 --out node0
""",
    "certificates sign": """\
  fedpdm certificates sign node-0.csr --ca authority --client 0 --out node0
""",
}
