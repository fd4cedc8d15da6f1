// Runs JavaScript and TypeScript for the guest agent: reads pieces from descriptor 3
// and answers with frames; see channel.rs. Node 18 and later.
//
// What is declared at the top level stays, and can be declared again: a parser, the
// one that Node has for its own prompt, finds `let`, `const`, `class` and `import`
// there, and they become variables. With `await` at the top level a piece becomes the
// body of an async function, and what it declares is still outside of it.
'use strict';
(require, load) => {
    const CHANNEL = 3;
    const HEADER_BYTES = 24;
    const RESEED = 1;
    const OK = 1, FAILED = 2, INTERRUPTED = 3;
    const MAX_ERROR_CHARS = 48 * 1024;
    // What a form of a result costs beside its bytes, and a result beside its forms.
    const FORM_BYTES = 16, RESULT_BYTES = 80, MAX_FORMS = 32;
    const OWN = 'soulbox-runner';
    const IMPORT = '__soulbox_import';

    // Code may have variables of these names.
    const { Atomics, Buffer, Int32Array, SharedArrayBuffer, Uint8Array, console, process } = globalThis;
    const fs = require('fs');
    const path = require('path');
    const util = require('util');
    const vm = require('vm');
    const { Module, createRequire } = require('module');
    const { pathToFileURL } = require('url');

    const isTypeScript = process.argv[1] === 'typescript';
    const state = { runs: false, resultLeft: 0, held: Buffer.alloc(0), interrupt: null, cell: { filename: '', lines: 0 } };

    // --- Frames, as protobuf encodes them ---

    function varint(number) {
        const bytes = [];
        for (; number > 127; number = Math.floor(number / 128)) bytes.push(number % 128 | 128);
        bytes.push(number);
        return Buffer.from(bytes);
    }

    // A field that is bytes, text or a message.
    function field(number, value) {
        if (typeof value === 'string') value = Buffer.from(value);
        return Buffer.concat([varint(number * 8 + 2), varint(value.length), value]);
    }

    // Together with those that were held back.
    function send(message, hold = false) {
        const length = Buffer.alloc(4);
        length.writeUInt32LE(message.length);
        const frames = Buffer.concat([state.held, length, message]);
        state.held = hold ? frames : Buffer.alloc(0);
        if (hold) return;
        for (let at = 0; at < frames.length;) {
            try {
                at += fs.writeSync(CHANNEL, frames, at);
            } catch (error) {
                // Until there is room: Node makes the channel non-blocking.
                if (error.code !== 'EAGAIN') throw error;
                Atomics.wait(PAUSE, 0, 0, 1);
            }
        }
    }

    const PAUSE = new Int32Array(new SharedArrayBuffer(4));

    const finished = (outcome) => Buffer.from([0x32, 2, 8, outcome]);

    // --- What is shown ---

    function show(main, data) {
        // Between runs there is nobody to show it to.
        if (!state.runs) return false;
        if (state.resultLeft < RESULT_BYTES) return true;
        const parts = main ? [Buffer.from([8, 1])] : [];
        const omitted = [];
        let left = state.resultLeft - RESULT_BYTES;
        for (let [mime, form] of Object.entries(data).slice(0, MAX_FORMS)) {
            mime = mime.slice(0, 128);
            if (typeof form === 'string') form = Buffer.from(form);
            if (mime.length + form.length + FORM_BYTES <= left) {
                left -= mime.length + form.length + FORM_BYTES;
                parts.push(field(2, Buffer.concat([field(1, mime), field(2, form)])));
            } else {
                omitted.push(mime);
            }
        }
        for (const mime of omitted) {
            left -= mime.length + FORM_BYTES;
            parts.push(field(4, mime));
        }
        state.resultLeft = left;
        // The value with what comes next: that is the end, and one wake-up less.
        send(field(4, Buffer.concat(parts)), main);
        return true;
    }

    const isBinary = (mime) => /^image\/(?!svg)|^application\/pdf$/.test(mime);

    function formOf(mime, value) {
        if (value instanceof Uint8Array) return Buffer.from(value);
        if (typeof value === 'string') return isBinary(mime) ? Buffer.from(value, 'base64') : value;
        return JSON.stringify(value) ?? 'null';
    }

    function isBundle(value) {
        const keys = value && Object.getPrototypeOf(value) === Object.prototype ? Object.keys(value) : [];
        return keys.length > 0 && keys.every((key) => /^[a-z]+\/[\w.+-]+$/.test(key));
    }

    const inspect = (value) => util.inspect(value, { colors: false });

    // As in Deno's notebooks, an object may say itself what it is to be shown as.
    const SELF = Symbol.for('Jupyter.display');

    async function display(value) {
        let data = value;
        if (typeof value?.[SELF] === 'function') data = await value[SELF]();
        if (!isBundle(data)) data = { 'text/plain': inspect(value) };
        const forms = Object.entries(data).map(([mime, form]) => [mime, formOf(mime, form)]);
        if (!show(false, Object.fromEntries(forms))) console.log(value);
    }

    async function showValue(value) {
        globalThis._ = value;
        if (value === undefined) return;
        const data = { 'text/plain': inspect(value) };
        if (typeof value?.[SELF] === 'function') {
            const own = await value[SELF]();
            for (const [mime, form] of Object.entries(own)) data[mime] = formOf(mime, form);
        }
        show(true, data);
    }

    // --- What runs ---

    const { Parser } = require('internal/deps/acorn/acorn/dist/acorn');
    const OPTIONS = {
        ecmaVersion: 'latest',
        sourceType: 'module',
        allowAwaitOutsideFunction: true,
        allowReturnOutsideFunction: false,
        allowHashBang: true,
    };

    // Sloppy code is no module, and `import` is no script: one of them has to do.
    function parse(code) {
        try {
            return Parser.parse(code, OPTIONS);
        } catch (error) {
            try {
                return Parser.parse(code, { ...OPTIONS, sourceType: 'script' });
            } catch {
                return null;
            }
        }
    }

    function namesIn(pattern, names) {
        switch (pattern?.type) {
            case 'Identifier': names.push(pattern.name); break;
            case 'ObjectPattern':
                for (const property of pattern.properties) namesIn(property.value ?? property.argument, names);
                break;
            case 'ArrayPattern': for (const element of pattern.elements) namesIn(element, names); break;
            case 'AssignmentPattern': namesIn(pattern.left, names); break;
            case 'RestElement': namesIn(pattern.argument, names); break;
        }
        return names;
    }

    // Finds every `import()`, and what is at the top level: within no function.
    function visit(node, found, isTop = true) {
        if (!node || typeof node.type !== 'string') return;
        if (node.type === 'ImportExpression') found.imports.push(node);
        if (/Function|^MethodDefinition$|^PropertyDefinition$|^StaticBlock$/.test(node.type)) isTop = false;
        if (isTop) {
            if (node.type === 'AwaitExpression' || (node.type === 'ForOfStatement' && node.await)) found.awaits = true;
            if (node.type === 'VariableDeclaration' && node.kind === 'var') found.vars.push(node);
            if (node.type === 'ForInStatement' || node.type === 'ForOfStatement') found.heads.add(node.left);
        }
        for (const key in node) {
            const child = node[key];
            if (Array.isArray(child)) for (const one of child) visit(one, found, isTop);
            else if (child && typeof child === 'object') visit(child, found, isTop);
        }
    }

    function importOf(node) {
        const attributes = (node.attributes ?? []).map(({ key, value }) => `${key.raw ?? key.name}: ${value.raw}`);
        const options = attributes.length ? `, { with: { ${attributes.join(', ')} } }` : '';
        const from = `await ${IMPORT}(${node.source.raw}${options})`;
        const parts = [];
        let rest = null;
        for (const { type, imported, local } of node.specifiers) {
            if (type === 'ImportDefaultSpecifier') parts.push(`default: ${local.name}`);
            else if (type === 'ImportNamespaceSpecifier') rest = local.name;
            else parts.push(`${imported.raw ?? imported.name}: ${local.name}`);
        }
        if (node.specifiers.length === 0) return `${from};`;
        if (rest === null) return `({ ${parts.join(', ')} } = ${from});`;
        const whole = `${rest} = ${from};`;
        return parts.length ? `${whole} ({ ${parts.join(', ')} } = ${rest});` : whole;
    }

    // Globals of Node's that are computed, such as `crypto`, may ignore what is assigned
    // to them: they become plain ones before code declares a variable of that name.
    function free(name) {
        const { get, configurable } = Object.getOwnPropertyDescriptor(globalThis, name) ?? {};
        if (get && configurable) {
            const value = globalThis[name];
            Object.defineProperty(globalThis, name, { value, writable: true, configurable: true });
        }
    }

    // The piece with what it declares made lasting: `source` runs as a script, and
    // where it is `async` its value is a promise of an array with the value. Lines stay
    // where they were, for the sake of errors, and the first begins with `head`
    // characters that nobody wrote.
    function transform(code) {
        const tree = parse(code);
        if (tree === null) return { source: code, head: 0, hasValue: true, isAsync: false };
        const found = { awaits: false, vars: [], imports: [], heads: new Set() };
        visit(tree, found);
        const body = tree.body.map((node) => (node.type.startsWith('Export') ? node.declaration ?? node : node));
        const isAsync = found.awaits || body.some((node) => node.type === 'ImportDeclaration');
        const edits = [];
        const edit = (start, end, text) => edits.push({ start, end, text });
        const names = [];
        const own = [];
        const functions = [];
        tree.body.forEach((outer, index) => {
            const node = body[index];
            if (outer !== node) edit(outer.start, node.start, '');
            else if (node.type.startsWith('Export')) edit(node.start, node.end, '');
            if (node.type === 'VariableDeclaration') {
                for (const { id } of node.declarations) namesIn(id, own);
                if (!isAsync) {
                    // As long as what it replaces, but for `let`.
                    edit(node.start, node.start + node.kind.length, 'var'.padEnd(node.kind.length));
                }
            } else if (node.type === 'ClassDeclaration' && node.id) {
                if (isAsync) names.push(node.id.name);
                edit(node.start, node.start, `${isAsync ? '' : 'var '}${node.id.name} = `);
                edit(node.end, node.end, ';');
            } else if (node.type === 'ImportDeclaration') {
                for (const { local } of node.specifiers) names.push(local.name);
                const lines = code.slice(node.start, node.end).split('\n').length - 1;
                edit(node.start, node.end, importOf(node) + '\n'.repeat(lines));
            } else if (node.type === 'FunctionDeclaration' && node.id && isAsync) {
                names.push(node.id.name);
                functions.push(node.id.name);
            }
        });
        if (isAsync) {
            const declared = new Set(found.vars);
            for (const node of body) if (node.type === 'VariableDeclaration') declared.add(node);
            for (const node of declared) {
                for (const { id } of node.declarations) namesIn(id, names);
                // `let a, b = 1` becomes `(a = undefined, b = 1)`; before `in` and `of`
                // only the name stays.
                const inLoop = found.heads.has(node);
                // A parenthesis at the start of a line would call what stands before it.
                const open = body.includes(node) ? ';(' : '(';
                edit(node.start, node.declarations[0].start, inLoop ? '' : open);
                for (const { id, init, end } of node.declarations) {
                    if (!init && !inLoop && node.kind !== 'var') edit(end, end, ' = undefined');
                }
                if (!inLoop) {
                    const last = node.declarations[node.declarations.length - 1];
                    edit(last.end, last.end, ')');
                }
            }
        }
        for (const { start } of found.imports) edit(start, start + 'import'.length, IMPORT);
        const last = body[body.length - 1];
        if (isAsync && last?.type === 'ExpressionStatement') {
            edit(last.start, last.start, 'return [(');
            edit(last.expression.end, last.end, ')];');
        }
        let source = '', at = 0;
        edits.sort((one, other) => one.start - other.start || one.end - other.end);
        for (const { start, end, text } of edits) {
            source += code.slice(at, start) + text;
            at = Math.max(at, end);
        }
        source += code.slice(at);
        own.concat(names).forEach(free);
        const variables = names.length ? `var ${[...new Set(names)].join(', ')}; ` : '';
        if (isAsync) {
            const hoisted = functions.map((name) => `globalThis.${name} = ${name}; `).join('');
            const head = `${variables}(async () => { ${hoisted}`;
            return { source: `${head}${source}\n})()`, head: head.length, isAsync };
        }
        // An object, as at a prompt, rather than a block with a label.
        if (tree.body.length === 1 && tree.body[0].type === 'BlockStatement') {
            const object = `(${code.trim().replace(/;$/, '')}\n)`;
            if (parse(object)) return { source: object, head: 1, hasValue: true, isAsync };
        }
        return { source, head: 0, hasValue: last?.type === 'ExpressionStatement', isAsync };
    }

    // As from a file in the working directory. What the engine does for `import()` in
    // a script depends on its version; so scripts call this instead.
    async function importHere(specifier, options) {
        specifier = String(specifier);
        if (/^\.{0,2}\//.test(specifier)) return load(pathToFileURL(path.resolve(specifier)).href, options);
        if (Module.builtinModules.includes(specifier) || /^[a-z]+:/.test(specifier)) return load(specifier, options);
        let file;
        try {
            file = createRequire(path.join(process.cwd(), 'here.js')).resolve(specifier);
        } catch (error) {
            // A package for `import` only has no file for `require`.
            if (error.code === 'ERR_PACKAGE_PATH_NOT_EXPORTED') return load(specifier, options);
            throw error;
        }
        return load(pathToFileURL(file).href, options);
    }

    function compile(source, filename, head = 0) {
        return new vm.Script(source, { filename, columnOffset: -head });
    }

    async function execute(code, filename) {
        if (isTypeScript) code = strip(code, filename);
        const { source, head, hasValue, isAsync } = transform(code);
        let script;
        try {
            script = compile(source, filename, head);
        } catch (error) {
            // The error of what was written is the better one, if that has one.
            compile(code, filename);
            throw error;
        }
        state.cell = { filename, lines: code.split('\n').length };
        let value = script.runInThisContext({ breakOnSigint: true, displayErrors: false });
        if (isAsync) value = (await orInterrupt(value))?.[0];
        else if (!hasValue) return;
        // What `main()` promises is worth waiting for, and what it prints meanwhile.
        if (value instanceof Promise) value = await orInterrupt(value);
        await showValue(value);
    }

    function orInterrupt(promise) {
        return Promise.race([promise, new Promise((_, reject) => {
            state.interrupt = () => reject(new Interrupted());
        })]);
    }

    class Interrupted extends Error {
        name = 'Interrupted';
        message = 'the code was interrupted';
    }

    function isInterrupt(error) {
        return error instanceof Interrupted || error?.code === 'ERR_SCRIPT_EXECUTION_INTERRUPTED';
    }

    // Without the frames of this runner and of what it runs in.
    function traceback(error) {
        const lines = String(error.stack ?? error).split('\n');
        const { filename, lines: length } = state.cell;
        const own = lines.findIndex((line) => {
            if (!/^ {4}at /.test(line)) return false;
            // Behind the last line, the function that a piece with `await` is made.
            const [, at] = line.split(`${filename}:`);
            return line.includes(OWN) || line.includes('node:vm') || parseInt(at) > length;
        });
        if (own >= 0) lines.length = own;
        while (/^ {4}at .*[( ]node:internal/.test(lines[lines.length - 1])) lines.pop();
        return lines;
    }

    function errorMessage(error) {
        if (isInterrupt(error)) error = { name: 'Interrupted', message: 'the code was interrupted' };
        let name, value, lines;
        try {
            if (error !== null && typeof error === 'object' && ('stack' in error || 'message' in error)) {
                name = String(error.name ?? 'Error');
                value = String(error.message);
                lines = error.stack ? traceback(error) : [`${name}: ${value}`];
            } else {
                name = 'Uncaught';
                value = inspect(error);
                lines = [`Uncaught ${value}`];
            }
        } catch {
            [name, value, lines] = ['Uncaught', 'an error whose text could not be made', []];
        }
        const parts = [field(1, name.slice(0, 1024)), field(2, value.slice(0, MAX_ERROR_CHARS / 4))];
        let left = MAX_ERROR_CHARS;
        for (const line of lines) {
            if (left <= 0) break;
            parts.push(field(3, line.slice(0, left)));
            left -= line.length + 1;
        }
        return field(5, Buffer.concat(parts));
    }

    async function run(number, code) {
        let outcome = OK;
        state.runs = true;
        try {
            await execute(code, `cell-${number}.${isTypeScript ? 'ts' : 'js'}`);
        } catch (error) {
            outcome = isInterrupt(error) ? INTERRUPTED : FAILED;
            send(errorMessage(error));
        }
        state.runs = false;
        state.interrupt = null;
        send(finished(outcome));
    }

    // Straight to the pipe: an interrupt in the middle of what Node's streams do about a
    // write would leave them waiting for its end for ever, and all later output with it.
    const pause = new Int32Array(new SharedArrayBuffer(4));
    for (const stream of [process.stdout, process.stderr]) {
        const fd = stream.fd;
        stream.write = (chunk, encoding, done) => {
            if (typeof encoding === 'function') [encoding, done] = [undefined, encoding];
            const bytes = typeof chunk === 'string' ? Buffer.from(chunk, encoding) : chunk;
            if (!(bytes instanceof Uint8Array)) throw new TypeError('what is written must be a string or bytes');
            for (let at = 0; at < bytes.length;) {
                try {
                    at += fs.writeSync(fd, bytes, at);
                } catch (error) {
                    if (error.code !== 'EAGAIN') break;
                    Atomics.wait(pause, 0, 0, 1);
                }
            }
            if (done) process.nextTick(done);
            return true;
        };
    }

    // --- TypeScript ---

    let stripTypes;

    function strip(code, filename) {
        try {
            return stripTypes(code, filename);
        } catch (error) {
            const message = String(error.message).replace(`Error transforming ${filename}: `, '');
            throw Object.assign(new SyntaxError(message), { stack: `${filename}\nSyntaxError: ${message}` });
        }
    }

    // Sucrase, or what Node has itself (22.13 and later).
    function findTypeScript() {
        const places = [
            '/usr/lib/soulbox/', path.join(process.cwd(), '/'), '/usr/local/lib/', '/usr/lib/',
            '/usr/share/nodejs/',
        ];
        for (const place of places) {
            try {
                const { transform: strip } = createRequire(place)('sucrase');
                return (code, filePath) => strip(code, {
                    transforms: ['typescript'],
                    // What one piece imports, the next may use.
                    keepUnusedImports: true,
                    disableESTransforms: true,
                    filePath,
                }).code;
            } catch (error) {
                if (error.code !== 'MODULE_NOT_FOUND') throw error;
            }
        }
        const own = require('module').stripTypeScriptTypes;
        return own && ((code) => own(code, { mode: 'transform' }));
    }

    // --- Random numbers ---

    // V8 seeds its own once, and a copy of this process would draw what the original
    // does. This is sfc32 (Chris Doty-Humphrey, PractRand), with a seed of the kernel's
    // that is drawn when it is needed, and anew in a copy.
    let a = 0, b = 0, c = 0, d = 0, seeded = false;

    function seed() {
        const bytes = Buffer.alloc(16);
        const file = fs.openSync('/dev/urandom');
        fs.readSync(file, bytes);
        fs.closeSync(file);
        [a, b, c, d] = [0, 4, 8, 12].map((at) => bytes.readInt32LE(at));
        seeded = true;
        for (let round = 0; round < 12; round++) draw();
    }

    function draw() {
        const t = ((a + b | 0) + d) | 0;
        d = d + 1 | 0;
        a = b ^ b >>> 9;
        b = c + (c << 3) | 0;
        c = (c << 21 | c >>> 11) + t | 0;
        return t >>> 0;
    }

    const random = {
        random() {
            if (!seeded) seed();
            return ((draw() >>> 5) * 67108864 + (draw() >>> 6)) / 9007199254740992;
        },
    }.random;

    // --- The loop ---

    function say(error) {
        process.stderr.write(`Uncaught ${inspect(error)}\n`);
    }

    function prepare() {
        // What `node -e` has made, in favour of what a file in the working directory has.
        globalThis.require = createRequire(path.join(process.cwd(), 'here.js'));
        globalThis.module = new Module('<cell>');
        globalThis.exports = globalThis.module.exports;
        globalThis.display = display;
        globalThis._ = undefined;
        Object.defineProperty(globalThis, IMPORT, { value: importHere });
        Object.defineProperty(Math, 'random', { value: random, writable: true, configurable: true });
        // Node would keep in memory what the agent has not read yet, and the programs
        // that code starts would find a pipe that does not block.
        for (const { _handle: pipe } of [process.stdout, process.stderr]) pipe?.setBlocking?.(true);
        process.execArgv = [];
        process.argv = [process.argv[0]];
        // Code that fails while nothing runs must not end what is kept here.
        process.on('uncaughtException', say);
        process.on('unhandledRejection', say);
        process.on('SIGINT', () => state.interrupt?.());
    }

    if (isTypeScript) {
        stripTypes = findTypeScript();
        if (!stripTypes) {
            send(field(5, Buffer.concat([field(1, 'InterpreterNotFound'), field(2,
                'there is nothing in the guest that strips types: install the npm package ' +
                'sucrase in /usr/lib/soulbox, or a Node of version 22.13 or later')])));
            process.exit(1);
        }
    }
    prepare();
    const channel = new (require('net').Socket)({ fd: CHANNEL });
    let received = Buffer.alloc(0);
    let turn = Promise.resolve();
    channel.on('data', (bytes) => {
        received = received.length ? Buffer.concat([received, bytes]) : bytes;
        while (received.length >= HEADER_BYTES) {
            const end = HEADER_BYTES + received.readUInt32LE(0);
            if (received.length < end) return;
            const header = received;
            const code = received.toString('utf8', HEADER_BYTES, end);
            received = received.subarray(end);
            turn = turn.then(() => {
                if (header.readUInt32LE(4) & RESEED) seeded = false;
                state.resultLeft = Number(header.readBigUInt64LE(16));
                return run(Number(header.readBigUInt64LE(8)), code);
            }).catch((error) => {
                // Code has broken what this runner works with.
                say(error);
                process.exit(70);
            });
        }
    });
    channel.on('error', () => process.exit(70));
    channel.on('end', () => process.exit(0));
    send(Buffer.alloc(0));
}
