"""Train SAGPool on PROTEINS and NCI1 with cross entropy and with the encouraging loss, as the paper does.

    python examples/graphs/train_graphs.py

trains every arm on 20 random splits of each data set and writes tables and pictures to runs/graphs/report.md. Finished
runs are kept, so the same command continues after an interruption.

The arm el_050_deferred has no bonus in the first epochs (PROTEINS 25, NCI1 130), when few graphs are well classified.
"""

import copy
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of experiment.py

try:
    import torch
    from experiment import Experiment, Options, parser
    from torch import Tensor, nn
    from torch.nn.functional import dropout
    from torch_geometric.data import Batch, Data
    from torch_geometric.datasets import TUDataset
    from torch_geometric.loader import DataLoader
    from torch_geometric.nn import GCNConv, SAGPooling, global_max_pool, global_mean_pool
    from tqdm import tqdm

    from encourage_mt import EncouragingLoss
    from encourage_mt.arguments import count
    from encourage_mt.environment import DOWNLOADS
    from encourage_mt.errors import UserError, as_user_error, exit_on_user_error
except ImportError as error:
    print(f"train_graphs.py: error: {error}: pip install -e '.[recipes,classification]'", file=sys.stderr)
    sys.exit(2)

ARMS: dict[str, Options] = {
    "ce": {"bonus": "none"},
    "el_050": {"log_end": 0.5},
    "el_050_deferred": {"log_end": 0.5, "deferred": True},
}
DEFERRED_EPOCHS = {"PROTEINS": 25, "NCI1": 130}
PUBLISHED = {  # accuracy of Zhao et al. 2022
    "PROTEINS": {"ce": 72.32, "el_050_deferred": 72.76},
    "NCI1": {"ce": 70.53, "el_050_deferred": 71.04},
}
HIDDEN, RATIO, DROPOUT = 128, 0.5, 0.5
RATE, DECAY, BATCH, PATIENCE = 5e-4, 1e-4, 128, 50
PARTS = ("A", "graph_indicator", "graph_labels", "node_labels")


class SAGPool(nn.Module):
    """The hierarchical network of Lee et al. 2019: three times a graph convolution and a pooling that keeps a half."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(GCNConv(size, HIDDEN) for size in (features, HIDDEN, HIDDEN))
        self.pools = nn.ModuleList(SAGPooling(HIDDEN, RATIO, GNN=GCNConv) for _ in range(3))
        for pool in self.pools:
            for weight in pool.select.parameters():
                # Lee et al. have no such weight. Its sign decides whether nodes with the highest or the lowest scores
                # are kept, and weight decay brings it to 0 (torch_geometric's issue 9862).
                nn.init.ones_(weight).requires_grad_(False)
        sizes = (2 * HIDDEN, HIDDEN, HIDDEN // 2, classes)
        self.linear = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False))

    def forward(self, graphs: Batch) -> Tensor:
        """Return logits [graphs, classes]."""
        x, edges, batch = graphs.x, graphs.edge_index, graphs.batch
        summary = 0
        for convolution, pool in zip(self.convolutions, self.pools, strict=True):
            x = convolution(x, edges).relu()
            x, edges, _, batch, *_ = pool(x, edges, batch=batch)
            readout = global_max_pool(x, batch, graphs.num_graphs), global_mean_pool(x, batch, graphs.num_graphs)
            summary = summary + torch.cat(readout, dim=1)
        hidden = dropout(self.linear[0](summary).relu(), DROPOUT, self.training)
        return self.linear[2](self.linear[1](hidden).relu())


def load(name: str, raw: Path | None, work: Path) -> TUDataset:
    """Return a data set of TUDataset. With `raw`, its files are in the folder raw/NAME; otherwise it is downloaded."""
    root = DOWNLOADS / "graphs"
    if raw:
        root = work / "data"
        target = root / name / "raw"
        paths = [raw / name / f"{name}_{part}.txt" for part in PARTS]
        for path in paths:
            if not path.exists():
                raise UserError(f"{path}: no such file; name the folder that has {name}/ with --raw-dir")
        target.mkdir(parents=True, exist_ok=True)
        for path in paths:
            shutil.copy(path, target)
    with as_user_error(f"{raw / name if raw else root / name}: damaged; remove it, and get the data set again"):
        try:
            graphs = TUDataset(str(root), name, force_reload=raw is not None)
        except OSError as error:  # does not name the data set
            raise UserError(f"{name}: {error}{'' if raw else '; if you have its files, use --raw-dir'}") from None
        for graph in graphs:
            graph.validate()  # edges lead to nodes that have features
            graph.y.item()
    return graphs


def split(size: int, seed: int) -> tuple[list[int], list[int], list[int]]:
    """Return the indices of train (80%), valid (10%) and test: the same for all arms of a seed."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    first, second = int(0.8 * size), int(0.9 * size)
    return order[:first], order[first:second], order[second:]


@torch.no_grad()
def accuracy(model: nn.Module, graphs: Batch) -> float:
    model.eval()
    return 100 * (model(graphs).argmax(dim=1) == graphs.y).double().mean().item()


def run(graphs: list[Data], name: str, epochs: int, options: Options, seed: int) -> dict[str, float]:
    """Train one network until its accuracy on valid has not risen for PATIENCE epochs; return its measures."""
    torch.manual_seed(seed)
    parts = [[graphs[index] for index in part] for part in split(len(graphs), seed)]
    valid, test = (Batch.from_data_list(part) for part in parts[1:])
    model = SAGPool(graphs[0].num_features, 1 + max(int(each.y) for each in graphs))
    criterion = EncouragingLoss(**{option: value for option, value in options.items() if option != "deferred"})
    start = DEFERRED_EPOCHS[name] if options.get("deferred") else 0
    optimizer = torch.optim.Adam(model.parameters(), RATE, weight_decay=DECAY)
    best, best_epoch, state, has_bonus = -1.0, 0, {}, False
    with tqdm(range(epochs), unit="epoch", leave=False) as bar:
        for epoch in bar:
            criterion.bonus_weight = float(epoch >= start)
            model.train()
            for batch in DataLoader(parts[0], BATCH, shuffle=True):
                loss = criterion(model(batch), batch.y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            reached = accuracy(model, valid)
            if reached > best:
                best, best_epoch, state = reached, epoch, copy.deepcopy(model.state_dict())
                has_bonus = criterion.options.has_bonus
            if epoch - best_epoch >= PATIENCE:
                break
    model.load_state_dict(state)
    return {
        "accuracy": accuracy(model, test),
        "valid accuracy": best,
        "best epoch": best_epoch + 1.0,
        "trained with bonus (%)": 100.0 * has_bonus,  # 0 if the best epoch is a deferred one
    }


def main() -> None:
    options = parser(__doc__, ARMS, tuple(PUBLISHED), "runs/graphs")
    options.set_defaults(seeds=20)
    text = "maximum number of epochs (default: %(default)s)"
    options.add_argument("--epochs", type=count, default=500, metavar="N", help=text)
    with exit_on_user_error("train_graphs.py"):
        arguments = options.parse_args()
        torch.set_num_threads(1)
        data = {}
        if not arguments.report_only:
            data = {name: list(load(name, arguments.raw_dir, arguments.work_dir)) for name in arguments.settings}

        def train(name, loss, seed, rate, tuning):
            return run(data[name], name, arguments.epochs, loss, seed)

        deferred = {f"deferred epochs, {name}": number for name, number in DEFERRED_EPOCHS.items()}
        training = {"epochs": arguments.epochs, "patience": PATIENCE, "batch": BATCH, **deferred}
        Experiment("Graphs", arguments, ARMS, (RATE,), "accuracy", training, train, PUBLISHED).run()


if __name__ == "__main__":
    main()
