from bench.quality import Quality


def to_html(quality: Quality) -> str:
    return quality.after
