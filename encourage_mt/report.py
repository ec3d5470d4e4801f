def write_report(comparison, baseline, candidate, output):
    pass
