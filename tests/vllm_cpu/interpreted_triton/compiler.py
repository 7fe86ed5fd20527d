from triton.backends.compiler import BaseBackend


class Backend(BaseBackend):
    """Never asked to compile."""

    supports_target = staticmethod(lambda target: target.backend == "cpu")

    def hash(self):
        return "interpreted"

    def parse_options(self, options):
        return options

    def add_stages(self, *args):
        pass

    def load_dialects(self, *args):
        pass

    def get_module_map(self):
        return {}
