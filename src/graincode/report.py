def write_report(folder):
    return folder / "index.html"
