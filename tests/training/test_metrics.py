"""The metrics file over crashes and resumed runs, and the picture of it."""

from pathlib import Path

from h_net_dynamic_chunking.training.metrics import MetricsLog, Row, plot, read_rows


def row(step: int, val_bpb: float | None = None) -> Row:
    return Row(step, 100 * step, 5.0 / step, val_bpb, [3.0, 6.5], 2.01, 1234.5, 1e-3)


def test_rows_are_on_the_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 0) as log:
        log.append(row(1, 8.0))
        assert read_rows(path) == [
            {
                "step": 1,
                "bytes_seen": 100,
                "train_bpb": 5.0,
                "val_bpb": 8.0,
                "bytes_per_chunk": [3.0, 6.5],
                "ratio_loss": 2.01,
                "bytes_per_second": 1234.5,
                "lr": 1e-3,
            }
        ]


def test_resuming_drops_rows_beyond_the_checkpoint_and_half_a_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 0) as log:
        for step in range(1, 6):
            log.append(row(step))
    with path.open("a") as file:
        file.write('{"step": 6, "bytes_s')
    assert [saved["step"] for saved in read_rows(path)] == [1, 2, 3, 4, 5]
    with MetricsLog(path, 3) as log:
        log.append(row(4))
    assert [saved["step"] for saved in read_rows(path)] == [1, 2, 3, 4]


def test_curves_are_a_png(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 0) as log:
        log.append(row(1, 8.0))
        log.append(row(2))
    plot(read_rows(path), (3.0, 6.0), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
