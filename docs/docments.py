"""Lets the reference show the comments that stand beside arguments and fields (nbdev's "docments")."""
import re
import griffe


OPTIONS = {'parser': 'google', 'parser_options': {'warn_missing_types': False, 'returns_named_value': False}}


def comment(lines: list, number: int) -> str:
    found = re.search(r'\s#\s+(.+)$', lines[number - 1])
    return found[1] if found else ''


def examples_as_code(text: str) -> str:
    "Paragraphs that begin with `>>>` become code, which no browser takes for quotations or elements."
    def fenced(m):
        lines = re.sub(r' *# doctest:.*', '', m[0].strip('\n'))
        return f'\n```pycon\n{lines}\n```\n'
    return re.sub(r'\n>>> (?:.+\n?)+', fenced, text)


class Docments(griffe.Extension):
    def on_function_instance(self, *, node, func, agent, **kw):
        lines = agent.filepath.read_text(encoding='utf-8').splitlines()
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if node.args.vararg: arguments.append(node.args.vararg)
        if node.args.kwarg: arguments.append(node.args.kwarg)
        alone = {a.lineno: a.arg for a in arguments if a.lineno != node.lineno}     # a line's comment is about its last argument
        about = [f'    {name}: {said}' for line, name in alone.items() if (said := comment(lines, line))]
        returned = comment(lines, node.returns.lineno) if node.returns else ''
        text = examples_as_code(func.docstring.value) if func.docstring else ''
        if about: text += '\n\nArgs:\n' + '\n'.join(about)
        if returned: text += f'\n\nReturns:\n    {returned}'
        if text: func.docstring = griffe.Docstring(text.strip(), parent=func, lineno=node.lineno, **OPTIONS)

    def on_class_members(self, *, node, cls, agent, **kw):
        "The fields of a class are a table, not a heading each."
        lines = agent.filepath.read_text(encoding='utf-8').splitlines()
        fields = [a for a in cls.members.values() if a.is_attribute]
        rows = []
        for a in fields:
            if a.name.startswith('__'): continue                  # an alias such as `__repr__ = __str__`
            kind = f' ({a.annotation})' if a.annotation else ''
            declared = 'class-attribute' in a.labels
            default = f'default `{a.value}`' if a.value and declared else ''
            about = a.docstring.value.strip() if a.docstring else comment(lines, a.lineno)
            rows.append(f'    {a.name}{kind}: {"; ".join(filter(None, [about, default]))}')
        for a in fields: cls.del_member(a.name)
        if not rows: return
        text = (cls.docstring.value if cls.docstring else '') + '\n\nAttributes:\n' + '\n'.join(rows)
        cls.docstring = griffe.Docstring(text.strip(), parent=cls, lineno=node.lineno, **OPTIONS)
