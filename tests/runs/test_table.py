"""What others wrote into a run's results does not keep a sweep from its table."""

import csv
import json

import pytest

from graincode.runs.table import write_sweep

DEEP = '{"objective": 1.0, "metrics": ' + '{"a":' * 10_000 + "1" + "}" * 10_001
RESULTS = {
    "a list": '{"objective": 1.0, "metrics": [1]}',
    "text": '{"objective": 1.0, "metrics": "x"}',
    "400 digits": '{"objective": 1.0, "metrics": {"mse": ' + "9" * 400 + "}}",
    "5000 digits": '{"objective": 1.0, "metrics": {"mse": ' + "9" * 5000 + "}}",
    "infinite": '{"objective": 1.0, "metrics": {"mse": 1e999}}',
    "nested": DEEP,
    "columns": '{"objective": 1.0, "metrics": {"run": 1.0, "status": 2.0, "error": 3.0}}',
    "escapes": json.dumps({"objective": 1.0, "metrics": {"\x1b[31m": 1.0, "<script>": 2.0, "$x_{": 3.0}}),
    "a class": json.dumps({"objective": 1.0, "metrics": {"_target_": "os.system", "command": "id"}}),
}


def members(tmp_path, text, spread):
    for name, content in (("bad", text), ("good", '{"objective": 1.0, "metrics": {"mse": 0.5}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(content, encoding="utf-8")
    (tmp_path / "bad" / "metrics.json").write_text(json.dumps({"uncertainty": spread}), encoding="utf-8")
    runs = enumerate(("bad", "good"))
    return [{"overrides": [f"seed={i}"], "status": 0, "run": str(tmp_path / name)} for i, name in runs]


@pytest.mark.when(
    "a run of a sweep has a result.json that is damaged or hostile", "its row says so, or lacks the value"
)
@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("spread", [{}, {"mse": {"std": "x"}}, {"mse": 5}])
@pytest.mark.parametrize("kind", RESULTS)
def test_a_table_is_written_whatever_a_result_holds(kind, spread, tmp_path):
    table = write_sweep(tmp_path, members(tmp_path, RESULTS[kind], spread))
    rows = list(csv.DictReader(table.open(encoding="utf-8", newline="")))
    assert [row["run"] for row in rows] == ["bad", "good"]
    assert [row["status"] for row in rows] == ["0", "0"]
    assert rows[1]["mse"] == "0.5"
